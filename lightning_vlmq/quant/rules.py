"""Which scheme each layer of a model gets: the scope, the first-and-last rule and the overrides by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.scheme import QuantScheme


def layer_schemes(vlm: VLM, scheme: QuantScheme) -> dict[nn.Module, tuple[str, QuantScheme | None]]:
    """Each linear and convolution layer in scope with its first qualified name and the scheme of its own.

    A layer object that sits in several places counts once; a rule that matches one of its names is for it.

    Args:
        vlm: the full-precision model.
        scheme: with its scope, its first-and-last rule and its overrides.

    Returns:
        In the model's order; the scheme is ``None`` for a layer that stays in full precision.

    Raises:
        VLMQError: a layer is shared with a tower outside the scope, an override matches no layer in scope or gives one
            a scheme that does not exist, or nothing is left to quantize.
    """
    names = _layers_in_scope(vlm, scheme)
    towers = {module: str(vlm.tower_of(places[0])) for module, places in names.items()}
    for rule in scheme.overrides:
        if not any(rule.matches(places, towers[module]) for module, places in names.items()):
            everything = [place for places in names.values() for place in places]
            raise VLMQError(
                f"override '{rule}' matches no layer of scope '{scheme.scope}'; nearest: {_nearest(rule.pattern, everything)}"
            )
    edges = set() if scheme.first_last == "same" else edge_layers(vlm, scheme.towers)
    schemes = {}
    for module, places in names.items():
        try:
            schemes[module] = (places[0], scheme.of_layer(places, towers[module], module in edges))
        except VLMQError as error:
            raise VLMQError(f"layer '{places[0]}': {error}") from error
    if all(own is None for _, own in schemes.values()):
        raise VLMQError("the overrides and first_last leave every layer in full precision; nothing would be quantized")
    return schemes


def edge_layers(vlm: VLM, towers: Iterable[str]) -> set[nn.Module]:
    """The first and last matrix layers of each tower, in the order in which its encoder runs them.

    First are the layers that take the very tensor that the first one takes: the patch stem of a vision tower, the
    query, key and value projections of a text transformer's first block. Last is the one that runs last: the projection
    into the joint space, or what a tower without one ends with.

    Args:
        vlm: the full-precision model; run once a tower on a blank image or a short text, in evaluation mode.
        towers: of ``vision`` and ``text``.
    """
    runs: list[tuple[nn.Module, Tensor]] = []
    layers = [module for module in vlm.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(lambda module, args: runs.append((module, args[0]))) for m in layers]
    device = next(vlm.parameters()).device
    training = vlm.training
    vlm.eval()
    edges: set[nn.Module] = set()
    try:
        with torch.no_grad():
            for tower in towers:
                runs.clear()
                if tower == "vision":
                    vlm.encode_image(torch.zeros(1, 3, vlm.image_size, vlm.image_size, device=device))
                else:
                    vlm.encode_text(vlm.tokenize(["a photo"]).to(device))
                edges |= {module for module, x in runs if x is runs[0][1]} | {runs[-1][0]}
    finally:
        for hook in hooks:
            hook.remove()
        vlm.train(training)
    return edges


def _layers_in_scope(vlm: VLM, scheme: QuantScheme) -> dict[nn.Module, list[str]]:
    """Every linear and convolution layer of the scope's towers, with all its qualified names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in vlm.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Conv2d):
            names.setdefault(module, []).append(name)
    inside = {m: [vlm.tower_of(place) in scheme.towers for place in places] for m, places in names.items()}
    for module, places in names.items():
        if any(inside[module]) and not all(inside[module]):
            raise VLMQError(
                f"layer '{places[0]}' is shared with a tower outside scope '{scheme.scope}'; use vision_text"
            )
    if not any(map(any, inside.values())):
        raise VLMQError(f"scope '{scheme.scope}' holds no linear or convolution layer to quantize; check the model")
    return {module: places for module, places in names.items() if any(inside[module])}


def _nearest(pattern: str, names: list[str]) -> str:
    """The three layer names that share the longest pieces with a pattern."""

    def shared(name: str) -> int:
        pieces = difflib.SequenceMatcher(None, pattern, name, autojunk=False).get_matching_blocks()
        return sum(piece.size**2 for piece in pieces)

    return ", ".join(sorted(names, key=shared, reverse=True)[:3])
