"""A residual stream: who writes to it and who reads from it, and what refuses one that is not exactly as known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import timm.layers
from open_clip import transformer as oc
from torch import nn

from lightning_vlmq.models.vlm import VLM

LAYER_NORMS = (nn.LayerNorm, oc.LayerNorm, oc.LayerNormFp32, timm.layers.LayerNorm, timm.layers.LayerNormFp32)

Slot = tuple[nn.Module, str]
"""Where a module or parameter sits: its owner and its name there."""


class NoStream(Exception):
    """A tower whose residual stream cannot be rotated; the message says why."""


@dataclass(frozen=True)
class Values:
    """An attention's value projection and the linear layer that reads the attended values.

    Attributes:
        source: the layer that makes the values.
        start: its first output channel that is a value (packed layers make queries and keys before).
        out: the layer that reads them.
        heads: number of heads, whose channels lie one head after the other.
    """

    source: nn.Linear
    start: int
    out: nn.Linear
    heads: int


@dataclass
class Stream:
    """One residual stream of a pre-LayerNorm transformer.

    Attributes:
        width: its number of channels.
        entries: norms whose output starts the stream (CLIP's ``ln_pre``).
        tables: parameters ``[..., width]`` that are added to it or start it.
        writers: layers whose output, scaled by the LayerScale where there is one, is added to it or starts it.
        readers: norms that read it, each with all linear layers that read the norm's output and nothing else.
        exits: norms that read it and whose output goes elsewhere too, or to no linear layer.
        values: attention inside the tower.
        pixels: layers that read the image, or the early convolutions' map of it.
    """

    width: int
    entries: list[Slot] = field(default_factory=list)
    tables: list[Slot] = field(default_factory=list)
    writers: list[tuple[nn.Linear | nn.Conv2d, Slot | None]] = field(default_factory=list)
    readers: list[tuple[Slot, list[nn.Linear]]] = field(default_factory=list)
    exits: list[Slot] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    pixels: list[nn.Conv2d] = field(default_factory=list)


def known_as(module: Any, kind: type[nn.Module], children: set[str], parameters: set[str]) -> None:
    """Refuse a module of another class, or of that class with parts that this file knows nothing of."""
    if type(module) is not kind:
        raise NoStream(f"a {type(module).__name__} stands where a {kind.__name__} is known")
    present = {n for part in (module._modules, module._parameters) for n, p in part.items() if p is not None}
    if unknown := present - children - parameters:
        raise NoStream(f"its {kind.__name__} has an unknown part '{min(unknown)}'")


def check_widths(stream: Stream) -> None:
    """Refuse norms that are no LayerNorm over the stream's channels, and layers that are not as wide as it."""
    for owner, name in [*stream.entries, *stream.exits, *(norm for norm, _ in stream.readers)]:
        norm = getattr(owner, name)
        if type(norm) not in LAYER_NORMS or norm.normalized_shape != (stream.width,):
            raise NoStream(f"its '{name}' is a {type(norm).__name__}, no LayerNorm over {stream.width} channels")
    for reader in (layer for _, layers in stream.readers for layer in layers):
        if not isinstance(reader, nn.Linear) or reader.in_features != stream.width:
            raise NoStream(f"a {type(reader).__name__} of another width reads it")
    for writer, _ in stream.writers:
        if not isinstance(writer, nn.Linear | nn.Conv2d) or len(writer.weight) != stream.width:
            raise NoStream(f"a {type(writer).__name__} of another width writes to it")
    for owner, name in stream.tables:
        if getattr(owner, name).shape[-1] != stream.width:
            raise NoStream(f"its table '{name}' is of another width")
    for values in stream.values:
        if not isinstance(values.out, nn.Linear) or len(values.source.weight) != values.start + values.out.in_features:
            raise NoStream("its values do not go to a linear layer one by one")


def check_unshared(vlm: VLM, stream: Stream) -> None:
    """Refuse a stream whose layers or norms are used in several places: each place would need a fold of its own."""
    places = Counter(id(module) for _, module in vlm.named_modules(remove_duplicate=False))
    norms = [getattr(*s) for s in [*stream.entries, *stream.exits, *(norm for norm, _ in stream.readers)]]
    norms += [getattr(*scale) for _, scale in stream.writers if scale is not None]
    layers: Iterable[nn.Module] = [layer for _, layers in stream.readers for layer in layers]
    used = [*norms, *layers, *(w for w, _ in stream.writers), *(owner for owner, _ in stream.tables)]
    used += [layer for v in stream.values for layer in (v.source, v.out)]
    shared = next((module for module in used if places[id(module)] != 1), None)
    if shared is not None:
        raise NoStream(f"a {type(shared).__name__} is used in several places")
