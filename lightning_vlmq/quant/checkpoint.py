"""Quantized models on disk: ``model.safetensors`` (every tensor) beside ``quant.json`` (how to rebuild the layers)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_vlmq.core.atomic import replacing, write_text
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import tensors_digest
from lightning_vlmq.core.names import one_line
from lightning_vlmq.core.tensorfiles import read_tensor_file
from lightning_vlmq.models.loading import origin
from lightning_vlmq.models.vlm import TOWERS, VLM
from lightning_vlmq.quant.attention import install_attention
from lightning_vlmq.quant.calibrating import run_once
from lightning_vlmq.quant.description import Description, LayerState, described, sealed
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers, swap_layers
from lightning_vlmq.quant.methods import find_method
from lightning_vlmq.quant.quantized import Quantized
from lightning_vlmq.quant.rotation.rotate import restore_rotation, rotated_towers
from lightning_vlmq.quant.transforms import TRANSFORMS

FORMAT = 3
WEIGHTS, DESCRIPTION = "model.safetensors", "quant.json"


@dataclass(frozen=True)
class QuantizedCheckpoint(Quantized):
    """What a quantized checkpoint says of itself: how it is quantized, and which model it is.

    Attributes:
        model: the VLM's name.
        pretrained: its weights' source.
        extra: whatever the writer added (JSON types).
    """

    model: str = ""
    pretrained: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def save_quantized(vlm: VLM, path_dir: str | Path, quantized: Quantized, extra: dict[str, Any] | None = None) -> Path:
    """Write a quantized model into a folder, made if need be; each file is replaced atomically, the description last.

    Args:
        vlm: a model that :func:`~lightning_vlmq.quant.quantize` changed (and perhaps training since).
        path_dir: the folder.
        quantized: what came back.
        extra: anything else worth keeping, JSON types.

    Returns:
        The folder.

    Raises:
        VLMQError: the method leaves more of a weight than integers: a control, or low-rank compensation.
    """
    if not all(layer.weight_fake_quant.has_integers for layer in quantized_layers(vlm).values()):
        raise VLMQError(
            f"the weights of '{quantized.method}' are not integers alone and cannot be saved as such; make the model anew"
        )
    folder = Path(path_dir)
    description = {
        "format": FORMAT,
        "model": vlm.name,
        "pretrained": vlm.pretrained,
        "origin": origin(vlm),
        "method": quantized.method.name,
        "options": asdict(quantized.method),  # all of them: a name's defaults may change
        "scheme": asdict(quantized.scheme),
        "rotated_streams": rotated_towers(vlm),
        "layers": {name: asdict(_layer_state(layer)) for name, layer in quantized_layers(vlm).items()},
        "coverage": quantized.coverage.to_dict(),
        "tensors": tensors_digest(vlm.state_dict(), 32),
        "extra": extra or {},
    }
    text = json.dumps(sealed(description), indent=1)
    write_tensors(folder / WEIGHTS, vlm.state_dict())
    write_text(folder / DESCRIPTION, text)
    return folder


def load_quantized(vlm: VLM, path_dir: str | Path) -> QuantizedCheckpoint:
    """Turn a full-precision model of the same architecture, in place, into the quantized one of a checkpoint.

    Outputs are bit-identical to the saved model's on the same machine. The model comes back in evaluation mode.

    Args:
        vlm: full-precision model; its weights are replaced.
        path_dir: a folder that :func:`save_quantized` wrote.

    Raises:
        VLMQError: a file is missing, damaged or of another format, or the model is of another architecture.
    """
    folder = Path(path_dir)
    description = described(read_description(folder / DESCRIPTION, FORMAT), folder / DESCRIPTION)
    tensors, _ = read_tensor_file(
        folder / WEIGHTS, "a folder that a quantized model was saved in", "save the quantized model again"
    )
    if tensors_digest(tensors, 32) != description.tensors:
        raise VLMQError(
            f"'{folder / WEIGHTS}' is damaged, or not the file that was saved with {DESCRIPTION}; save the quantized model again"
        )
    checkpoint = restore_structure(vlm, description, tensors, folder)
    try:
        vlm.load_state_dict(tensors)
    except RuntimeError as error:
        raise VLMQError(
            f"checkpoint '{folder}' does not fit model '{vlm.name}': {str(error).splitlines()[-1].strip()}"
        ) from error
    vlm.eval()
    return checkpoint


def restore_structure(
    vlm: VLM, description: Description, tensors: dict[str, torch.Tensor], folder: Path
) -> QuantizedCheckpoint:
    """Give a full-precision model the modules of a saved quantized one, in place; their values are still to be loaded.

    Args:
        vlm: full-precision model of the same architecture.
        description: the content of ``quant.json``.
        tensors: the saved tensors; of these only the input transforms' are read, for their shapes.
        folder: where both come from, for messages.

    Raises:
        VLMQError: the description names something unknown, or the model is of another architecture.
    """
    checkpoint = QuantizedCheckpoint(
        find_method(description.method, description.options),
        description.scheme,
        description.coverage,
        description.model,
        description.pretrained,
        description.extra,
    )
    transforms = {state.input_transform for state in description.layers.values() if state.input_transform is not None}
    if strangers := transforms - set(TRANSFORMS):
        raise unknown("input transform", min(strangers), TRANSFORMS)
    if strangers := set(description.rotated_streams) - set(TOWERS):
        raise unknown("tower", min(strangers), TOWERS)
    try:
        return _restored(vlm, checkpoint, description, tensors, folder)
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:  # the tensors do not make these layers
        if isinstance(error, VLMQError):
            raise
        raise VLMQError(
            f"'{folder}' does not hold the layers that its description tells of ({one_line(str(error))[:200]}); save it again"
        ) from error


def _restored(
    vlm: VLM, checkpoint: QuantizedCheckpoint, description: Description, tensors: dict[str, torch.Tensor], folder: Path
) -> QuantizedCheckpoint:
    restore_rotation(vlm, description.rotated_streams)
    swap_layers(vlm, checkpoint.scheme)
    install_attention(vlm, checkpoint.scheme, partial(run_once, vlm, checkpoint.scheme))
    layers = quantized_layers(vlm)
    if set(layers) != set(description.layers):
        raise VLMQError(
            f"checkpoint '{folder}' is of model '{checkpoint.model}', whose layers are not those of '{vlm.name}'"
        )
    owners = Counter(id(layer.weight) for layer in layers.values())
    for name, layer in layers.items():
        _restore_layer_state(name, layer, description.layers[name], tensors)
        if owners[id(layer.weight)] > 1:  # a method may have given tied layers weights of their own
            layer.set_weight(layer.weight)
    return checkpoint


def _layer_state(layer: QuantizedLayer) -> LayerState:
    kinds = {TRANSFORMS[name]: name for name in TRANSFORMS}
    transform = type(layer.input_transform)
    return LayerState(
        None if transform is nn.Identity else kinds[transform],
        layer.weight_fake_quant.dynamic,
        layer.weight_fake_quant.offset is not None,
        layer.act_fake_quant.offset is not None,
    )


def _restore_layer_state(name: str, layer: QuantizedLayer, state: LayerState, tensors: dict[str, torch.Tensor]) -> None:
    """Give a fresh layer the parts that its tensors are about to fill."""
    layer.weight_fake_quant.dynamic = state.weight_dynamic
    for has_offset, quantizer in (
        (state.weight_offset, layer.weight_fake_quant),
        (state.act_offset, layer.act_fake_quant),
    ):
        if has_offset:
            quantizer.set_offset(torch.zeros_like(quantizer.scale))
    if state.input_transform is not None:
        prefix = f"{name}.input_transform."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        layer.input_transform = TRANSFORMS[state.input_transform](**own).to(layer.weight.device)


def read_description(path: Path, form: int) -> dict[str, Any]:
    """The content of a saved model's JSON description, whose ``format`` must be ``form``; a bad one is a ``VLMQError``."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VLMQError(
            f"cannot read '{path}' ({error.strerror}); give a folder that a quantized model was saved in"
        ) from error
    except (ValueError, RecursionError) as error:
        raise VLMQError(f"'{path}' is damaged ({one_line(str(error))}); save the quantized model again") from error
    if not isinstance(description, dict) or description.get("format") != form:
        raise VLMQError(f"'{path}' is not of checkpoint format {form}; save the quantized model again")
    return description


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name, atomically; they may be on any device, views, or share memory (tied weights)."""
    with replacing(path) as partial:
        # cloned, because safetensors refuses tensors that share memory
        save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, partial, metadata)
