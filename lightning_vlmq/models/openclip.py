"""open_clip's models as VLMs: by name and tag, by name and file, or from a folder or repository with its own config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import open_clip
from torch import nn

from lightning_vlmq.core.errors import VLMQError, first_line, unknown
from lightning_vlmq.core.identity import digest, tensors_digest
from lightning_vlmq.core.preprocessing import Framing, Preprocessing, ResizeMode
from lightning_vlmq.models.fetching import download, one_line_errors
from lightning_vlmq.models.provenance import RANDOM, Provenance
from lightning_vlmq.models.recipes import Activation, Recipe, is_quick, recipe_of_file, recipe_of_tag
from lightning_vlmq.models.vlm import VLM, draw_missing_weights
from lightning_vlmq.models.weights import fit

CONFIG = "open_clip_config.json"
SCHEMAS = ("hf-hub:", "local-dir:")
PREPROCESS = tuple(field.name for field in fields(open_clip.transform.PreprocessCfg))
"""Entries of open_clip's preprocessing configs."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")


def load_named(name: str, pretrained: str | None, trained_like: str | None, activation: Activation | None) -> VLM:
    """An architecture of open_clip's list with the weights of a tag or a file, or with random ones.

    Args:
        name: the architecture.
        pretrained: tag, file, or ``none``.
        trained_like: for a file, the tag that it shares activation and preprocessing with, or ``architecture``.
        activation: what the weights were trained with, where the tag is wrong or unknown.

    Raises:
        VLMQError: no weights are named, or unknown ones; the activation is not known; the file does not fit.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        offered = f"a tag ({', '.join(tags)}), " if tags else ""
        raise VLMQError(
            f"model '{name}' needs weights: set pretrained to {offered}a file, or {RANDOM} for random weights"
        )
    is_file = "/" in pretrained or Path(pretrained).suffix != "" or Path(pretrained).is_file()
    if trained_like is not None and not is_file:
        raise VLMQError(
            f"trained_like is for files of weights; '{pretrained}' says itself how it was trained, leave it out"
        )
    config = open_clip.get_model_config(name)
    path: Path | None = None
    if pretrained == RANDOM:
        recipe = Recipe(is_quick(config), {})
    elif is_file:
        path = Path(pretrained)
        if not path.is_file():
            raise VLMQError(
                f"checkpoint '{path}' does not exist; give the path of a file or one of the tags {', '.join(tags)}"
            )
        recipe = recipe_of_file(name, path, config, trained_like, activation)
    else:
        recipe = recipe_of_tag(name, pretrained, config, activation)
    if activation is not None:
        recipe = Recipe(activation == "quick_gelu", recipe.preprocess)
    config["quick_gelu"] = recipe.quick_gelu
    tokenize = tokenizer_of(name)
    model = build(name, config)
    if pretrained == RANDOM:
        draw_missing_weights(model)
    else:
        fit(model, path or download(name, pretrained))
    vlm = _finish(model, tokenize, name, pretrained, recipe.preprocess, config)
    vlm.activation = "quick_gelu" if recipe.quick_gelu else "gelu"
    return vlm


def load_folder(name: str, folder: Path, revision: str = "") -> VLM:
    """A model from a folder in open_clip's layout: its config, weights and, where its text tower needs them, tokenizer files.

    Args:
        name: what it is called in results, with its schema.
        folder: where it lies.
        revision: commit of the repository that it comes from.

    Raises:
        VLMQError: the folder lacks its config or weights, or they do not go together.
    """
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config, preprocess = dict(content["model_cfg"]), dict(content.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VLMQError(f"'{folder / CONFIG}' is no config of an open_clip model ({first_line(error)})") from error
    if odd := [part for part in ("vision_cfg", "text_cfg") if not isinstance(config.get(part), dict)]:
        raise VLMQError(f"'{folder / CONFIG}' is no config of an open_clip model (it has no table {odd[0]})")
    _require_known(preprocess, name)
    path = _weights_in(folder)
    tokenize = tokenizer_of(f"local-dir:{folder}")
    model = build(name, config)
    fit(model, path)
    return _finish(model, tokenize, name, path.name, preprocess, config, revision)


def _finish(
    model: nn.Module,
    tokenize: Any,
    name: str,
    source: str,
    preprocess: Mapping[str, Any],
    config: Mapping[str, Any],
    revision: str = "",
) -> VLM:
    vlm = VLM(model, tokenize, name, source, preprocessing(model, preprocess, name))
    vlm.provenance = Provenance(source, tensors_digest(vlm.state_dict(), 64), digest(config), revision)
    return vlm


def preprocessing(model: Any, preprocess: Mapping[str, Any], name: str) -> Preprocessing:
    """What open_clip's own transform does to an image for a model.

    Args:
        model: an open_clip model, which knows its size.
        preprocess: entries of open_clip's preprocessing config; the rest is open_clip's default.
        name: the model, for messages.

    Raises:
        VLMQError: the model takes images that are not square, or an entry is unknown.
    """
    sizes = model.visual.image_size
    height, width = sizes if isinstance(sizes, (tuple, list)) else (sizes, sizes)
    if height != width:
        raise VLMQError(f"model '{name}' takes images of {height} x {width} pixels; only square ones are supported")
    config = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), dict(preprocess))
    mean, std = (v if isinstance(v, (tuple, list)) else (v,) * 3 for v in (config["mean"], config["std"]))
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"  # "random" is for training
    framing = Framing(int(height), config["resize_mode"], interpolation, config["fill_color"])  # type: ignore[arg-type]
    return Preprocessing(framing, tuple(mean), tuple(std))


def _require_known(preprocess: Mapping[str, Any], name: str) -> None:
    """Refuse entries that open_clip's preprocessing config does not have, or values that its transform does not take."""
    known = {"interpolation": ("bicubic", "bilinear", "random"), "mode": ("RGB",), "resize_mode": get_args(ResizeMode)}
    for entry, value in preprocess.items():
        if entry not in PREPROCESS:
            raise unknown(f"entry of preprocess_cfg in the config of '{name}':", str(entry), PREPROCESS)
        if value is not None and entry in known and value not in known[entry]:
            raise unknown(f"{entry} in the config of '{name}':", str(value), known[entry])


def build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The architecture of a config, freshly drawn; no weights of towers are fetched."""
    entries = json.loads(json.dumps(config))
    custom = entries.pop("custom_text", False) or "hf_model_name" in entries["text_cfg"]
    if "timm_model_name" in entries["vision_cfg"]:
        entries["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in entries["text_cfg"]:
        entries["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CLIP if not custom else open_clip.CoCa if "multimodal_cfg" in entries else open_clip.CustomTextCLIP
    try:
        with one_line_errors(f"cannot build model '{name}'"):
            return kind(**entries)
    except TypeError as error:
        raise VLMQError(
            f"cannot build model '{name}': its config has an entry too many ({first_line(error)})"
        ) from error


def tokenizer_of(name: str) -> Any:
    """open_clip's tokenizer of an architecture or ``local-dir:`` folder. Raises :class:`VLMQError` where its files lack."""
    with one_line_errors(f"cannot make the tokenizer of '{name}'"):
        return open_clip.get_tokenizer(name)


def _weights_in(folder: Path) -> Path:
    """The one file of weights in a folder, or the index of its shards."""
    preferred = (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    for name in preferred:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if not found:
        raise VLMQError(f"folder '{folder}' holds no weights; put {preferred[0]} there")
    if len(found) > 1:
        raise VLMQError(
            f"folder '{folder}' holds several files of weights ({', '.join(p.name for p in found[:3])}); "
            f"call the one that is meant {preferred[0]}"
        )
    return found[0]
