"""VLMs by name: the embedded zoo, open_clip's architectures, folders and repositories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import digest, tensors_digest
from lightning_vlmq.core.preprocessing import Framing, Preprocessing
from lightning_vlmq.models import huggingface, openclip, zoo
from lightning_vlmq.models.fetching import NotHere, fetch_repository, nothing_fetched
from lightning_vlmq.models.provenance import EMBEDDED, RANDOM, Provenance
from lightning_vlmq.models.recipes import ARCHITECTURE, Activation
from lightning_vlmq.models.vlm import VLM, require_finite

SCHEMAS = openclip.SCHEMAS


def load_vlm(
    name: str,
    pretrained: str | None = None,
    trained_like: str | None = None,
    activation: Activation | None = None,
) -> VLM:
    """Build a VLM by name, ready for evaluation (``eval()`` mode).

    Args:
        name: an embedded zoo model (``"vit_clean"``), an open_clip architecture (``"ViT-B-32"``), ``"local-dir:<folder>"`` or
            ``"hf-hub:<owner>/<repository>"``, where a folder or repository is open_clip's or one that transformers'
            ``save_pretrained`` wrote.
        pretrained: an open_clip weights tag (``"laion2b_s34b_b79k"``), a file of weights, or ``"none"`` for random ones, drawn
            with torch's global generator. Zoo models, folders and repositories carry their own weights; for a zoo model a file or
            ``"none"`` replaces them.
        trained_like: for a file, the tag whose activation and preprocessing it shares, or ``"architecture"`` for those of the
            architecture's own config; asked for where the architecture's tags differ.
        activation: ``"gelu"`` or ``"quick_gelu"``, where neither tag nor config is to decide.

    Raises:
        VLMQError: unknown name (with the nearest ones); no weights, or weights that are missing, truncated, ill-fitting or not
            finite; options that would be ignored.
    """
    if name in zoo.buildable():
        _refuse(name, trained_like=trained_like, activation=activation)
        vlm = _load_embedded(name, pretrained)
    elif name.startswith(SCHEMAS):
        _refuse(name, pretrained=pretrained, trained_like=trained_like, activation=activation)
        vlm = _load_by_schema(name)
    elif name in open_clip.list_models():
        vlm = openclip.load_named(name, pretrained, trained_like, activation)
    else:
        raise unknown("model", name, [*zoo.names(), *open_clip.list_models()])
    require_finite(vlm)
    if not 0 < vlm.logit_scale().item() < math.inf:
        raise VLMQError(
            f"the logit scale of '{name}' is e to the {vlm.model.logit_scale.item():g}, which is no number in single precision; weights "
            "hold the logarithm of the scale"
        )
    return vlm.eval()


def origin(vlm: VLM) -> dict[str, Any]:
    """What :func:`load_origin` needs to build a VLM again, JSON types. One that no loader made counts as drawn."""
    return {
        "name": vlm.name,
        "pretrained": vlm.pretrained,
        "activation": vlm.activation,
        "preprocessing": asdict(vlm.preprocessing),
        "provenance": asdict(vlm.provenance or Provenance(RANDOM, "", "")),
    }


def load_origin(described: Mapping[str, Any], with_weights: bool = True, typed: str | None = None) -> VLM:
    """Build a VLM again from what :func:`origin` said of it.

    A file says what; only its user says what may be fetched: without ``typed`` what is not on this machine is refused.

    Args:
        described: that.
        with_weights: whether to load its weights; without, they are drawn, and nothing is needed but for folders and
            repositories, whose architecture lies with their weights.
        typed: the model's name, given by the user beside the description.

    Raises:
        VLMQError: as :func:`load_vlm`; the weights are not those of then; the description lacks something.
    """
    try:
        name, provenance = str(described["name"]), Provenance(**described["provenance"])
        entries = dict(described["preprocessing"])
        seen = Preprocessing(Framing(**entries.pop("framing")), **entries)
        activation, pretrained = described["activation"], str(described["pretrained"])
    except (KeyError, TypeError) as error:
        raise VLMQError(f"the description of the model lacks something ({error}); save the model again") from error
    source: str | None = provenance.source if with_weights else RANDOM
    like = None
    if name in zoo.buildable():
        source, activation = None if source == "embedded" else source, None
    elif name.startswith(SCHEMAS):
        source, activation = None, None
    elif source is not None and Path(source).is_file():
        like = ARCHITECTURE
    if typed is not None and typed != name:
        raise VLMQError(f"the model was made from '{name[:100]}', not from '{typed}'; give that name to fetch it")
    try:
        with nullcontext() if typed is not None else nothing_fetched():
            vlm = load_vlm(name, source, like, activation)
    except NotHere as error:
        raise VLMQError(
            f"'{name[:100]}', which the model was made from, is not on this machine, and a file's word fetches nothing; if you trust "
            f"it, name it too: model={name[:100]}"
        ) from error
    assert vlm.provenance is not None
    if with_weights and provenance.source != RANDOM and vlm.provenance.weights != provenance.weights:
        raise VLMQError(
            f"the weights of '{name}' ({provenance.source}) are not those that the model was made from; restore them"
        )
    vlm.pretrained, vlm.preprocessing, vlm.provenance = pretrained, seen, provenance
    for buffer, values in ((vlm.mean, seen.mean), (vlm.std, seen.std)):
        buffer.copy_(torch.tensor(values).view_as(buffer))
    return vlm


def known_vlm(name: str, pretrained: str | None) -> None:
    """Refuse a name, weights or a folder that no loader knows, without loading anything; repositories are not looked for.

    Raises:
        VLMQError: as :func:`load_vlm`.
    """
    if name.startswith(SCHEMAS):
        _refuse(name, pretrained=pretrained)
        schema, place = _parts(name)
        if schema == "local-dir":
            _folder(name, place)
        return
    if name not in zoo.buildable() and name not in open_clip.list_models():
        raise unknown("VLM", name, [*zoo.names(), *open_clip.list_models()])
    tags = [] if name in zoo.buildable() else open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None and name not in zoo.buildable():
        raise VLMQError(f"model '{name}' needs weights: write {name}@<tag>, @<file>, or @{RANDOM} for random ones")
    if pretrained and pretrained != RANDOM and not Path(pretrained).is_file() and pretrained not in tags:
        raise unknown(f"weights of {name}", pretrained, [*tags, RANDOM])


def split_name(text: str) -> tuple[str, str | None]:
    """A VLM written ``name@weights``, as studies do, in its parts. A folder or repository keeps whatever ``@`` it has."""
    if text.startswith(SCHEMAS):
        return text, None
    name, _, weights = text.partition("@")
    return name, weights or None


def _refuse(name: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise VLMQError(f"'{name}' says itself what it is: {option} '{value}' would be ignored, leave it out")


def _load_embedded(name: str, pretrained: str | None) -> VLM:
    if pretrained == RANDOM:
        vlm = zoo.build(name)
        vlm.pretrained = RANDOM
    else:
        vlm = zoo.load(name, pretrained)
        if pretrained is not None:
            vlm.pretrained = pretrained
    source = EMBEDDED if pretrained is None else pretrained
    vlm.provenance = Provenance(source, tensors_digest(vlm.state_dict(), 64), digest(repr(vlm.model)))
    return vlm


def _parts(name: str) -> tuple[str, str]:
    schema, _, place = name.partition(":")
    if not place:
        raise VLMQError(
            f"'{name}' names no {'folder' if schema == 'local-dir' else 'repository'}; put one after the colon"
        )
    return schema, place


def _folder(name: str, place: str) -> Path:
    if not (folder := Path(place).expanduser()).is_dir():
        raise VLMQError(f"folder '{folder}' of '{name}' does not exist; check the path")
    return folder


def _load_by_schema(name: str) -> VLM:
    schema, place = _parts(name)
    folder, revision = (_folder(name, place), "") if schema == "local-dir" else fetch_repository(place)
    if (folder / openclip.CONFIG).is_file():
        return openclip.load_folder(name, folder, revision)
    if (folder / huggingface.CONFIG).is_file():
        return huggingface.load_saved(name, folder, revision)
    raise VLMQError(
        f"folder '{folder}' holds neither {openclip.CONFIG} nor transformers' {huggingface.CONFIG}; give one in either's layout"
    )
