"""``vlmq convert``: a saved fake-quantized model becomes a low-bit one, checked against it and measured beside FP32."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance
from rich import print as rich_print
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.atomic import require_writable
from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.sets import in_distribution
from lightning_vlmq.lowbit.convert import (
    Activations,
    Conversion,
    Kernels,
    amend_description,
    convert_layers,
    save_converted,
)
from lightning_vlmq.lowbit.costs import latencies, setting, sizes
from lightning_vlmq.lowbit.export import PROGRAMS, export_encoder
from lightning_vlmq.models import RANDOM, VLM
from lightning_vlmq.quant.checkpoint import (
    DESCRIPTION,
    FORMAT,
    load_quantized,
    read_description,
)
from lightning_vlmq.quant.description import described
from lightning_vlmq.quant.outliers import rebuild


@dataclass(frozen=True)
class Agreement:
    """How alike the zero-shot logits of two models are.

    Attributes:
        images: number of images.
        cosine: mean over images of the cosine between both logit vectors.
        lowest_cosine: the smallest of them.
        top1: share (0 to 1) of images for which both models name the same class.
    """

    images: int
    cosine: float
    lowest_cosine: float
    top1: float


def convert(
    checkpoint: str,
    out: str,
    activations: Activations = "keep",
    kernels: Kernels = "torchao",
    float8: bool = False,
    device: str = "cpu",
    data: ReliabilityDataModule = lazy_instance(EmbeddedData, datasets=("concepts",), n_id=400),  # noqa: B008
    min_cosine: float = 0.999,
    min_top1: float = 0.99,
    export: bool = True,
    pixels: Literal["uint8", "float32"] = "uint8",
    batch: int = 32,
    rounds: int = 20,
    compile: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Turn a saved fake-quantized model into one that holds and multiplies integers.

    Writes ``model.safetensors``, ``convert.json`` and, unless told otherwise, ``image_encoder.pt2`` and ``text_encoder.pt2``,
    which run with torch and torchao alone. Prints sizes and latencies beside full precision's.

    Args:
        checkpoint: folder of the fake-quantized model.
        out: folder to write, made if need be.
        activations: keep the grids of layer inputs, make them dynamic or static, or quantize weights alone (none).
        kernels: torchao's tensors wherever it has one for a layer, or own integer layers everywhere.
        float8: 8-bit floating point in linear layers instead of integers; for GPUs that have it.
        device: where to convert and measure, and what the programs are for.
        data: its id set is what both models are compared on, its caption pairs calibrate static activations.
        min_cosine: smallest mean cosine between both models' logits that is no error; 0 takes everything.
        min_top1: smallest share of images with the same top class that is no error; 0 takes everything.
        export: write the programs.
        pixels: what the image program takes: uint8 in 0..255 or float32 in 0..1.
        batch: images (or texts) per call when measuring latency.
        rounds: timed calls per model; both models take turns.
        compile: measure both models compiled by torch.compile too.
        model: the model's name as the checkpoint has it, where its full-precision weights are not on this machine: only what is named
            here is fetched, whatever the checkpoint says.

    Returns:
        What ``convert.json`` tells: ``layers``, ``agreement``, ``bytes``, ``latency_ms`` and ``setting``.

    Raises:
        VLMQError: a folder, file, layer or device that does not do; models that agree less than asked for.
    """
    if batch < 1 or rounds < 1:
        raise VLMQError(f"batch and rounds must be at least 1, got {batch} and {rounds}")
    folder, conversion = Path(checkpoint), Conversion(activations, kernels, float8)
    target = _target(Path(out))
    description = read_description(folder / DESCRIPTION, FORMAT)
    made_from = asdict(described(description, folder / DESCRIPTION).origin)
    full = rebuild(made_from, typed=model).requires_grad_(False).to(_device(device))
    quantized = copy.deepcopy(full)
    saved = load_quantized(quantized, folder)
    data.follow(full.preprocessing.framing)
    data.setup("validate")
    pairs = data.calibration_batches() if activations == "static" else []
    calibration = [{"image": b["image"], "tokens": full.tokenize(b["caption"])} for b in pairs]
    converted = copy.deepcopy(quantized)
    layers = convert_layers(converted, conversion, saved.scheme, calibration)

    agreement = compare(quantized, converted, id_images(data), data.class_names, data.templates)
    if not (agreement.cosine >= min_cosine and agreement.top1 >= min_top1):
        raise VLMQError(
            f"the converted model does not agree with '{folder}': mean cosine of logits {agreement.cosine:.5f} (asked for "
            f"{min_cosine}), same top class {agreement.top1:.2%} (asked for {min_top1:.2%}); lower min_cosine and min_top1 to "
            "convert it all the same"
        )
    report: dict[str, Any] = {
        "layers": layers,
        "agreement": asdict(agreement),
        "latency_ms": latencies(full, converted, saved.scheme.towers, batch, rounds, compile),
        "setting": setting(full, batch, rounds),
        "random_weights": full.pretrained == RANDOM,
    }
    save_converted(converted, target, conversion, description, **report)
    for program in PROGRAMS.values():
        (target / program).unlink(missing_ok=True)
    if export:
        for tower, program in PROGRAMS.items():
            export_encoder(converted, tower, target / program, pixels)
    report["bytes"] = sizes(full, converted, target)
    amend_description(target, bytes=report["bytes"])
    rich_print(_table(report, target))
    return report


def id_images(data: ReliabilityDataModule) -> list[Tensor]:
    """The images of a data module's in-distribution set, uint8 ``[b, 3, h, w]`` each batch."""
    loaders = data.val_dataloader()
    inside = in_distribution(data.eval_sets)
    loader = next(loader for s, loader in zip(data.eval_sets, loaders) if s is inside)
    return [b["image"] for b in loader]


@torch.no_grad()
def compare(
    first: VLM, second: VLM, images: Iterable[Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Agreement:
    """Zero-shot logits of two models on the same images, each with its own text encoder.

    Args:
        first: a model.
        second: another, on the same device.
        images: batches, uint8 ``[b, 3, h, w]``.
        class_names: one name per class.
        templates: prompts with one ``{}`` for the class name.
    """
    classes = [vlm.class_features(class_names, templates) for vlm in (first, second)]
    cosines, same = [], []
    for batch in images:
        x = batch.to(first.mean.device)
        a, b = (v.zero_shot_logits(v.encode_image(x), c) for v, c in zip((first, second), classes))
        cosines.append(F.cosine_similarity(a.double(), b.double()).cpu())
        same.append((a.argmax(1) == b.argmax(1)).cpu())
    cosine = torch.cat(cosines)
    return Agreement(len(cosine), cosine.mean().item(), cosine.min().item(), torch.cat(same).double().mean().item())


def _target(out: Path) -> Path:
    """The folder to write, made before any work is done."""
    if (out / DESCRIPTION).exists():
        raise VLMQError(f"'{out}' holds a fake-quantized model, which this would overwrite; give out another folder")
    try:
        require_writable(out)
    except OSError as error:
        raise VLMQError(
            f"cannot make folder '{out}' or write to it ({error.strerror}); give out another one"
        ) from error
    return out


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VLMQError(f"device '{name}' is not there ({first_line(error)}); use cpu or cuda") from error
    return device


def _table(report: dict[str, Any], folder: Path) -> Table:
    """The report for ``rich.print``."""
    agreement, setting = report["agreement"], report["setting"]
    kinds = [layer["kind"] for layer in report["layers"].values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    table = Table(
        title=f"Converted to {escape(str(folder))}{' (random weights)' if report['random_weights'] else ''}",
        caption=f"{counts}. Same top class on {agreement['top1']:.2%} of {agreement['images']} images, mean cosine of logits "
        f"{agreement['cosine']:.6f}. Latency: batch {setting['batch']}, {setting['threads']} thread(s), {setting['hardware']}.",
    )
    for column in ("", "FP32", "converted", "FP32 / converted"):
        table.add_column(column, justify="left" if not column else "right")
    for what, label in (("file", "file, MB"), ("memory", "parameters in memory, MB")):
        fp32, low = (report["bytes"][what][key] for key in ("fp32", "converted"))
        table.add_row(label, f"{fp32 / 1e6:.2f}", f"{low / 1e6:.2f}", f"{fp32 / low:.2f}")
    for encoder, times in report["latency_ms"].items():
        for suffix in ("", " compiled"):
            if f"fp32{suffix}" in times:
                fp32, low = times[f"fp32{suffix}"], times[f"converted{suffix}"]
                cells = (f"{t['mean']:.2f} ± {t['stderr']:.2f}" for t in (fp32, low))
                table.add_row(f"{encoder} encoder{suffix}, ms", *cells, f"{fp32['mean'] / low['mean']:.2f}")
    return table
