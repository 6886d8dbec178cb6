"""Fake-quantized models turned into low-bit ones, and low-bit models on disk.

A folder holds ``model.safetensors`` (torchao's tensors taken apart by its own helpers, integers below 8 bits packed) and
``convert.json`` (how to rebuild the model, and what was measured).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization.granularity import PerAxis, PerTensor, PerToken
from torchao.utils import is_MI300, is_MI350, is_sm_at_least_89

from lightning_vlmq.core.atomic import write_text
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import tensors_digest
from lightning_vlmq.core.tensorfiles import read_tensor_file
from lightning_vlmq.lowbit.layers import TensorLinear, low_bit_layer, pack, unpack
from lightning_vlmq.models import VLM
from lightning_vlmq.quant.calibrating import Batch, RangeObserver, calibrate
from lightning_vlmq.quant.checkpoint import WEIGHTS, read_description, restore_structure, write_tensors
from lightning_vlmq.quant.description import described
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantConv2d, QuantizedLayer, quantized_layers
from lightning_vlmq.quant.outliers import rebuild
from lightning_vlmq.quant.scheme import UNQUANTIZED_BITS, QuantScheme

FORMAT = 2
DESCRIPTION = "convert.json"
Activations = Literal["keep", "dynamic", "static", "none"]
Kernels = Literal["torchao", "own"]


@dataclass(frozen=True)
class Conversion:
    """What a fake-quantized model is to become.

    Attributes:
        activations: ``keep`` the grids of layer inputs as they are; make them ``dynamic`` (one range per token, or per image of a
            convolution) or ``static`` (calibrated) with the bits they have, 8 where they have none; or ``none``: weights alone.
        kernels: ``torchao``: its tensors wherever it has one for a layer; ``own``: this package's integer layers everywhere, which
            keep weights below 8 bits packed in memory (on disk they always are).
        float8: 8-bit floating point in linear layers instead of integers.

    Raises:
        VLMQError: for an unknown word.
    """

    activations: Activations = "keep"
    kernels: Kernels = "torchao"
    float8: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("activations", Activations), ("kernels", Kernels)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))


def convert_layers(
    vlm: VLM, conversion: Conversion, scheme: QuantScheme, calibration: Sequence[Batch] = ()
) -> dict[str, dict[str, Any]]:
    """Replace, in place, every fake-quantized layer by its low-bit counterpart; everything else stays as it is.

    Args:
        vlm: a quantized model.
        conversion: what the layers become.
        scheme: of the model; its scope says which encoders calibration runs.
        calibration: batches as :func:`~lightning_vlmq.quant.calibrating.calibrate` takes them; for ``static`` only.

    Returns:
        For each layer, by its first qualified name: ``kind``, ``weight_bits``, ``act_bits`` and ``inputs``.

    Raises:
        VLMQError: no quantized layer, a layer without a calibrated range or of a shape that has no low-bit counterpart (named),
            float8 on a device without it.
    """
    layers = quantized_layers(vlm)
    if not layers:
        raise VLMQError("the model has no quantized layer, so there is nothing to convert")
    if conversion.float8:
        require_float8(next(vlm.parameters()).device)
    vlm.eval().requires_grad_(False)
    fresh = _replace_input_grids(layers, conversion.activations)
    if fresh:
        observers = {name: RangeObserver() for name in fresh}
        calibrate(vlm, scheme, calibration, observers)
        for name, observer in observers.items():
            layers[name].act_fake_quant.set_range(observer.minimum, observer.maximum)
    return _swap(vlm, conversion)


def require_float8(device: torch.device) -> None:
    """Raise :class:`VLMQError` where the hardware has no float8 products."""
    if device.type != "cuda" or not (is_sm_at_least_89() or is_MI300() or is_MI350()):
        raise VLMQError(
            f"float8 needs a GPU with float8 products (NVIDIA from compute capability 8.9, AMD MI300), which '{device}' is not; "
            "leave float8 out for integers"
        )


def _replace_input_grids(layers: Mapping[str, QuantizedLayer], activations: str) -> list[str]:
    """Give the layers other input quantizers; the names of those that are to be calibrated come back."""
    fresh = []
    for name, layer in layers.items():
        old = layer.act_fake_quant
        in_full_precision = not (old.quantizes or layer.weight_fake_quant.quantizes)
        if activations == "keep" or in_full_precision or (activations == "static" and old.is_static):
            continue
        bits = UNQUANTIZED_BITS if activations == "none" else old.bits if old.quantizes else 8
        dynamic = activations == "dynamic"
        row = PerAxis(0) if isinstance(layer, QuantConv2d) else PerToken()
        new = FakeQuantizer(bits, old.symmetric, row if dynamic else PerTensor(), dynamic=dynamic)
        layer.act_fake_quant = new.requires_grad_(False).eval().to(layer.weight.device)
        if activations == "static":
            fresh.append(name)
    return fresh


def _swap(vlm: VLM, conversion: Conversion) -> dict[str, dict[str, Any]]:
    """Put the low-bit layers in place of the fake-quantized ones, a shared one in all its places."""
    replacement: dict[nn.Module, nn.Module] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, layer in quantized_layers(vlm).items():
        weight, act = layer.weight_fake_quant, layer.act_fake_quant
        try:
            if any(q.quantizes and not q.dynamic and not q.calibrated for q in (weight, act)):
                raise VLMQError("a quantizer has no range; calibrate or train the model, then save it again")
            new = low_bit_layer(layer, conversion.kernels == "own", conversion.float8)
        except VLMQError as error:
            raise VLMQError(f"layer '{name}' cannot be converted: {error}") from error
        replacement[layer] = new
        tensor = type(new.weight).__name__ if isinstance(new, TensorLinear) else type(new).__name__
        inputs = "none" if not act.quantizes else "dynamic" if act.dynamic else "static"
        described[name] = {"kind": tensor, "weight_bits": weight.bits, "act_bits": act.bits, "inputs": inputs}
    for parent in list(vlm.modules()):
        for child_name, child in parent._modules.items():
            if child in replacement:
                parent._modules[child_name] = replacement[child]
    return described


def flat_state(vlm: VLM) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A converted model's tensors as they are in memory, torchao's taken apart, and torchao's description of them."""
    flat: tuple[dict[str, Tensor], dict[str, str]] = flatten_tensor_state_dict(vlm.state_dict())
    return flat


def save_converted(
    vlm: VLM, path_dir: str | Path, conversion: Conversion, quantized: dict[str, Any], **more: Any
) -> Path:
    """Write a converted model into a folder, made if need be; each file is replaced atomically, the description last.

    Args:
        vlm: a model that :func:`convert_layers` changed.
        path_dir: the folder.
        conversion: how it was converted.
        quantized: the description of the quantized model, the content of its ``quant.json``.
        more: further entries of the description, JSON types.

    Returns:
        The folder.
    """
    folder = Path(path_dir)
    tensors, metadata = flat_state(vlm)
    for key, layer in _sub_byte(vlm).items():
        tensors[key] = pack(tensors[key], layer.bits)
    write_tensors(folder / WEIGHTS, tensors, metadata)
    description = {
        "format": FORMAT,
        "conversion": asdict(conversion),
        **more,
        "tensors": tensors_digest(tensors, 32),
        "quantized": quantized,
    }
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1))
    return folder


def amend_description(folder: Path, **more: Any) -> None:
    """Add to (or change in) a converted model's ``convert.json`` entries of JSON types, atomically."""
    description = read_description(folder / DESCRIPTION, FORMAT)
    write_text(folder / DESCRIPTION, json.dumps({**description, **more}, indent=1))


def load_converted(path_dir: str | Path, device: str | torch.device = "cpu", model: str | None = None) -> VLM:
    """Rebuild a converted model, ready for inference; its outputs are those of the saved model to the last bit.

    Nothing but the folder is needed and nothing is fetched, but for ``hf-hub:`` models, whose architecture lies with their weights:
    where these are not on this machine, ``model`` has to name the repository.

    Args:
        path_dir: a folder that :func:`save_converted` or ``vlmq convert`` wrote.
        device: where the model goes; float8 needs one that has it.
        model: the model's name, which allows to fetch what belongs to it.

    Raises:
        VLMQError: a file is missing, damaged or of another format.
    """
    folder = Path(path_dir)
    description = read_description(folder / DESCRIPTION, FORMAT)
    tensors, metadata = read_tensor_file(
        folder / WEIGHTS, "a folder that 'vlmq convert' wrote", "convert the model again"
    )
    try:
        conversion = Conversion(**description["conversion"])
        quantized = described(description["quantized"], folder / DESCRIPTION)
        kept = str(description["tensors"])
    except (KeyError, TypeError, AttributeError) as error:
        raise VLMQError(
            f"'{folder / DESCRIPTION}' is not a converted model's description ({error}); convert again"
        ) from error
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are all replaced
        vlm = rebuild(asdict(quantized.origin), with_weights=False, typed=model)
    if tensors_digest(tensors, 32) != kept:
        raise VLMQError(
            f"'{folder / WEIGHTS}' is damaged, or not the file that was written with {DESCRIPTION}; convert the model again"
        )
    vlm.eval().requires_grad_(False).to(device)
    if conversion.float8:
        require_float8(vlm.mean.device)
    restore_structure(vlm, quantized, tensors, folder)
    layers = quantized_layers(vlm)
    _replace_input_grids(layers, conversion.activations)
    for quantized_layer in layers.values():
        for quantizer in (quantized_layer.weight_fake_quant, quantized_layer.act_fake_quant):
            quantizer.set_qparams(torch.ones_like(quantizer.scale))  # stands in until the file's tensors are loaded
    _swap(vlm, conversion)
    try:
        for key, layer in _sub_byte(vlm).items():
            tensors[key] = unpack(tensors[key], layer.bits, layer.weight.shape)
        state, _ = unflatten_tensor_state_dict(tensors, metadata)
        vlm.load_state_dict({key: tensor.to(device) for key, tensor in state.items()}, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise VLMQError(
            f"'{folder}' does not hold the model that its {DESCRIPTION} tells of: {reason}; convert again"
        ) from error
    return vlm.eval().requires_grad_(False)


def _sub_byte(vlm: VLM) -> dict[str, TensorLinear]:
    """The layers whose tensor holds integers below 8 bits in a byte each, by the name of these among the flat tensors."""
    layers = {n: m for n, m in vlm.named_modules(remove_duplicate=False) if isinstance(m, TensorLinear)}
    return {f"{name}._weight_qdata": layer for name, layer in layers.items() if layer.bits < 8}
