"""The model that a run is about: named, quantized or restored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import Quantization, Quantized, load_quantized, quantize
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.scheme import FULL_PRECISION, QuantScheme
from lightning_vlmq.results.schema import RunKey


def run_key(vlm: VLM, quant: Quantization, scheme: QuantScheme | None) -> RunKey:
    """What is evaluated, as results name it; ``scheme`` is ``None`` in full precision."""
    seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))  # where Lightning keeps seed_everything's
    if scheme is None:
        return RunKey(vlm.name, vlm.pretrained, "none", FULL_PRECISION, 32, 32, seed)
    bits = scheme.weight_bits, scheme.act_bits
    return RunKey(vlm.name, vlm.pretrained, scheme.scope, quant.method, *bits, seed, quant.variant)


def restored(vlm: VLM, quant: Quantization, checkpoint: str) -> tuple[Quantization, Quantized]:
    """Put a saved quantization in place of a full-precision model; what it is, and what came of it.

    Raises:
        VLMQError: the checkpoint is damaged, or of another model.
    """
    saved = load_quantized(vlm, checkpoint)
    return replace(quant, method=str(saved.method), options={}, **asdict(saved.scheme)), saved


def quantized(vlm: VLM, quant: Quantization, data: ReliabilityDataModule, may_train: bool) -> Quantized:
    """Quantize a full-precision model in place, calibrated on the data module's caption pairs.

    Args:
        vlm: the model, on the device to run on.
        quant: how, with a scheme.
        data: the data module, set up.
        may_train: whether training follows, without which a method that trains is no method yet.

    Raises:
        VLMQError: a method that trains and training does not follow; what :func:`~lightning_vlmq.quant.quantize` refuses.
    """
    method, scheme = quant.chosen(), quant.scheme()
    assert scheme is not None
    if method.needs_training and not may_train:
        raise VLMQError(
            f"{quant.method} is trained: run 'vlmq fit --config qat' first, or give its result by --model.checkpoint"
        )
    return quantize(vlm, method, scheme, list(calibration(vlm, data)), quant.minimum_coverage)


def calibration(vlm: VLM, data: ReliabilityDataModule) -> Iterator[Batch]:
    """The caption pairs as batches of images and tokens, on the model's device."""
    device = vlm.mean.device
    for batch in data.calibration_batches():
        yield {"image": batch["image"].to(device), "tokens": vlm.tokenize(batch["caption"]).to(device)}
