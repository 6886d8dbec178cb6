"""Files of weights, in the formats they come in, as tensors by the names that open_clip gives them."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.models.archives import Inert, read_archive, script_tensors

log = logging.getLogger(__name__)

INDEX = ".index.json"
"""How the name of an index of shards ends."""

CONTAINERS = ("state_dict", "model", "model_state_dict")
"""Entries of a checkpoint that hold the weights, when they are not the checkpoint itself."""

SCRIPT_EXTRAS = re.compile(r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask)$")
"""Tensors that OpenAI's archives hold beside the weights: sizes, and the causal mask, which the architecture makes itself."""

WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)")
"""What torch.compile and FSDP put into the names of what they wrap."""


def is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI published CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def is_openais(path: Path) -> bool:
    """Whether a TorchScript archive is OpenAI's own, which alone holds the model's sizes as tensors; one of another model does not."""
    content = read_archive(path) if is_script(path) else None
    return isinstance(content, Inert) and script_tensors(content).keys() >= {
        "input_resolution",
        "context_length",
        "vocab_size",
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file: safetensors, ``torch.save`` of a state dict or of a checkpoint with one, TorchScript.

    An index of shards (``*.index.json``) stands for all of them. The file is read as data, nothing in it is run.

    Raises:
        VLMQError: the file is missing or damaged, or holds no tensors by name.
    """
    if not path.is_file():
        raise VLMQError(f"checkpoint '{path}' does not exist; give the path of a file of weights")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_archive(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    if isinstance(content, Inert):
        state = {name: t for name, t in script_tensors(content).items() if not SCRIPT_EXTRAS.search(name)}
    else:
        state = _weights_in(content, path)
    if not state:
        raise VLMQError(f"checkpoint '{path}' holds no tensors by name; save a model's state_dict()")
    return state


def fit(model: nn.Module, path: Path) -> None:
    """Load a file's weights into an open_clip model, in place. All of them: nothing is left as it was drawn.

    Wrappers' prefixes are taken off, third parties' names translated, low precision widened. Position embeddings of another image
    size or context length are interpolated, which is said in one line.

    Raises:
        VLMQError: as :func:`read_weights`; tensors are missing, left over or of another shape.
    """
    if path.suffix in (".npz", ".npy"):
        _fit_big_vision(model, path)
        return
    state = _without_prefix(read_weights(path), path)
    state = convert_state_dict(model, state)  # type: ignore[arg-type]
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)
    if "text.transformer.embeddings.position_ids" not in own:  # older transformers kept this as a buffer
        state.pop("text.transformer.embeddings.position_ids", None)
    _interpolate(model, state, own, path)
    check_fit(state, own, f"checkpoint '{path}'")
    model.load_state_dict(state)


def check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    """Raise :class:`VLMQError` unless the tensors are those of the model, by name and shape; the message says which are not.

    Args:
        state: what was read.
        own: what the model has.
        what: what was read, for the message.
    """
    missing = [name for name in own if name not in state]
    strange = [name for name in state if name not in own]
    reshaped = [
        f"{n} is {_shape(state[n])} for {_shape(own[n])}" for n in own if n in state and state[n].shape != own[n].shape
    ]
    said = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for names, problem in ((missing, "missing"), (strange, "left over"), (reshaped, "of another shape"))
        if names
    ]
    if said:
        raise VLMQError(f"{what} does not fit the model: {'; '.join(said)}; give the architecture it was trained as")
    for name, tensor in state.items():
        if own[name].is_floating_point() and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
            raise no_floats(what, name, tensor.dtype)
    if any(tensor.dtype == torch.float64 and own[name].dtype == torch.float32 for name, tensor in state.items()):
        log.warning("%s is in double precision; it is rounded to single", what)


def no_floats(what: str, name: str, kind: object) -> VLMQError:
    """What is said of weights that are integers or floats of 8 bits, whose scales nobody reads."""
    return VLMQError(
        f"{what} holds '{name}' as {kind}; give weights in floating point of 16 bits or more, not quantized ones"
    )


def _interpolate(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Position embeddings to the model's lengths, as open_clip does, and a line for each that changes."""
    before = {name: tensor.shape for name, tensor in state.items() if name.endswith("positional_embedding")}
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except Exception as error:  # asserts, and shapes that no interpolation joins
        raise VLMQError(
            f"checkpoint '{path}' does not fit the model: its position embeddings cannot be interpolated ({error}); give the "
            "architecture it was trained as"
        ) from error
    for name, shape in before.items():
        if state[name].shape != shape:
            what = "image size" if name.startswith("visual") else "context length"
            log.warning(
                "'%s' was trained with another %s: '%s' is interpolated from %d to %d positions",
                *(path, what, name, shape[0], len(state[name])),
            )


def _without_prefix(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of the one CLIP-like model among the tensors: those beside a ``logit_scale``, or Apple's and timm's as they are."""
    state = {WRAPPERS.sub("", name).lstrip("."): tensor for name, tensor in state.items()}
    scales = [name for name in state if name.rpartition(".")[2] == "logit_scale"]
    prefixes = [name.removesuffix("logit_scale") for name in scales]
    if len(prefixes) > 1:
        raise VLMQError(
            f"checkpoint '{path}' holds several models, under {', '.join(map(repr, prefixes))}; save the one that is meant alone"
        )
    if not prefixes:
        some = ", ".join(list(state)[:3])
        raise VLMQError(
            f"checkpoint '{path}' is no CLIP-like model: it has no 'logit_scale', but {some}, …; give the weights of both towers"
        )
    prefix = prefixes[0]
    beside = sorted({name.split(".")[0] for name in state if not name.startswith(prefix)})
    if beside:
        log.warning("'%s': of the tensors only those under '%s' are read, not %s", path, prefix, ", ".join(beside[:5]))
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, wherever it lies."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) > 1:
        return tensors
    inside = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
    if len(inside) > 1:
        raise VLMQError(f"checkpoint '{path}' holds weights under {', '.join(inside)}; save one of them alone")
    others = [str(n) for n, value in content.items() if n not in CONTAINERS and _is_clip(value)]
    if inside and others:
        raise VLMQError(
            f"checkpoint '{path}' holds weights under {', '.join([*inside, *others])}; save one of them alone"
        )
    if inside:
        return _weights_in(content[inside[0]], path)
    if isinstance(content.get("model"), Inert):
        raise VLMQError(
            f"checkpoint '{path}' holds a whole pickled model, which would have to be run; save its state_dict()"
        )
    return tensors


def _is_clip(value: Any) -> bool:
    """Whether it is weights of a whole model, not settings of one."""
    if not isinstance(value, Mapping):
        return False
    return any(str(name).rpartition(".")[2] == "logit_scale" and isinstance(value[name], Tensor) for name in value)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VLMQError(
            f"checkpoint '{path}' is damaged or no safetensors file ({first_line(error)}); fetch it again"
        ) from error


def _read_legacy(path: Path) -> Any:
    """A file of torch before 1.6, which was no archive."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes nearly anything be raised
        raise VLMQError(
            f"checkpoint '{path}' is damaged or holds more than tensors ({first_line(error)}); fetch it again, or save its "
            "state_dict() as safetensors"
        ) from error


def shards_of(path: Path) -> list[Path]:
    """The files of weights beside an index of shards that it names; none for any other file.

    Raises:
        VLMQError: the file is called an index and is none.
    """
    if not path.name.endswith(INDEX):
        return []
    return [path.parent / name for name in sorted({Path(name).name for name in _weight_map(path).values()})]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VLMQError(f"'{index}' is no index of weights ({first_line(error)}); fetch it again") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = _weight_map(index)
    state: dict[str, Tensor] = {}
    for path in shards_of(index):
        own = read_weights(path)
        state |= {name: t for name, t in own.items() if Path(shards.get(name, path.name)).name == path.name}
    if missing := sorted(shards.keys() - state.keys()):
        raise VLMQError(f"'{index}' names {len(missing)} tensors that its files lack ({missing[0]}, …); fetch it again")
    return state


def _fit_big_vision(model: nn.Module, path: Path) -> None:
    """Weights of Google's big_vision (SigLIP), which open_clip writes into the model itself."""
    if not isinstance(model, open_clip.CustomTextCLIP):
        raise VLMQError(f"'{path}' holds big_vision weights, which only SigLIP's architectures take; give one of these")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_big_vision_weights(model, str(path))
    except Exception as error:  # a missing array is a KeyError, another shape a RuntimeError
        raise VLMQError(
            f"checkpoint '{path}' does not fit the model ({type(error).__name__}: {first_line(error)}); give the architecture "
            "it was trained as"
        ) from error
    kept = [n for n, t in model.state_dict().items() if t.ndim > 1 and torch.equal(t, before[n])]
    _say_resampled(model.state_dict(), path)
    if kept:
        raise VLMQError(f"checkpoint '{path}' has nothing for {len(kept)} weights of the model ({kept[0]}, …)")


def _say_resampled(own: Mapping[str, Tensor], path: Path) -> None:
    """A line where open_clip resamples big_vision's patches or positions, which it does without a word."""
    patches, positions = own.get("visual.trunk.patch_embed.proj.weight"), own.get("visual.trunk.pos_embed")
    with np.load(path) as arrays:
        for name in arrays.files:
            if name.endswith("img/embedding/kernel") and patches is not None:
                there, here, what = arrays[name].shape[0], patches.shape[-1], "patches of another size"
            elif name.endswith("img/pos_embedding") and positions is not None:
                there, here, what = arrays[name].shape[-2], positions.shape[-2], "another image size"
            else:
                continue
            if there != here:
                log.warning("'%s' was trained with %s: '%s' is resampled from %d to %d", path, what, name, there, here)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
