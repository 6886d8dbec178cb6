"""What a VLM costs per image on this machine, measured before a study is planned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import open_clip
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.filedata import FileData
from lightning_vlmq.data.images import FileImages, Preprocess
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.models import VLM, load_vlm, split_name
from lightning_vlmq.models.local import encode_patches
from lightning_vlmq.models.openclip import preprocessing
from lightning_vlmq.models.provenance import RANDOM
from lightning_vlmq.quant.outliers import MARK
from lightning_vlmq.study.run.grid import Run
from lightning_vlmq.study.run.inputs import data_of, model_setting

TIMED_IMAGES = 8


@dataclass(frozen=True)
class UnitCosts:
    """Of one VLM, measured on this machine.

    Attributes:
        forward: seconds to encode an image in full precision.
        width: features per image.
        patches: patches of an image whose features a score compares; 0 where none does.
        decode: seconds to read and decode an image as the VLM wants it framed; 0 where images are in memory.
        preprocess: that framing; ``None`` where images are in memory.
        is_measured: whether it is this VLM's own: one that cannot be built here is taken as the mean of the others, its features and
            images as large as the largest.
    """

    forward: float
    width: int
    patches: int = 0
    decode: float = 0.0
    preprocess: Preprocess | None = None
    is_measured: bool = True


Costs = Mapping[str, UnitCosts]
"""By VLM."""


def measure(runs: Sequence[Run], sets: Sequence[EvalSet], has_patches: bool) -> Costs:
    """Time each VLM on a few images, and decoding as it wants them; random weights where its own would have to be fetched.

    Args:
        runs: the grid.
        sets: its evaluation sets.
        has_patches: whether a score compares patches.

    Raises:
        VLMQError: no VLM can be built here, or an image cannot be read.
    """
    files = next((s.images for s in sets if isinstance(s.images, FileImages)), None)
    data = data_of(runs[0].arguments)
    trained_like = model_setting(runs[0].arguments, "trained_like")
    decoding: dict[Preprocess, float] = {}
    found: dict[str, UnitCosts] = {}
    names = dict.fromkeys(run.vlm for run in runs)
    for name in names:
        try:
            vlm = _built(name, trained_like)
        except (VLMQError, OSError, ImportError):
            continue
        forward, width = _timed(vlm)
        found[name] = UnitCosts(forward, width, _patches(vlm) if has_patches else 0)
        if files is not None and isinstance(data, FileData):
            data.follow(vlm.preprocessing.framing)
            wanted = data.reading.preprocess
            if wanted not in decoding:
                decoding[wanted] = _decoding(replace(files.preprocess, **vars(wanted.framing)), files)
            found[name] = replace(found[name], decode=decoding[wanted], preprocess=wanted)
    if not found:
        raise VLMQError("none of the study's VLMs can be built here, so nothing can be measured; check study.axes.vlm")
    return {name: found.get(name) or _like(list(found.values())) for name in names}


def _like(others: Sequence[UnitCosts]) -> UnitCosts:
    """What stands for a VLM that cannot be built here."""
    framed = [cost.preprocess for cost in others if cost.preprocess is not None]
    return UnitCosts(
        forward=mean(cost.forward for cost in others),
        width=max(cost.width for cost in others),
        patches=max(cost.patches for cost in others),
        decode=mean(cost.decode for cost in others),
        preprocess=max(framed, key=lambda preprocess: preprocess.size, default=None),
        is_measured=False,
    )


def _built(name: str, trained_like: str | None = None) -> VLM:
    """The VLM with its own weights where it is embedded or in a folder, else of its architecture with random ones, framed as by its tag."""
    architecture, pretrained = split_name(name.partition(MARK)[0])
    if architecture.startswith("hf-hub:"):
        raise VLMQError(f"'{name}' would have to be fetched")
    vlm = load_vlm(architecture, RANDOM if pretrained else None)
    if pretrained and (said := open_clip.get_pretrained_cfg(architecture, trained_like or pretrained)):
        vlm.preprocessing = preprocessing(vlm.model, said, architecture)
    return vlm


def _decoding(preprocess: Preprocess, files: FileImages) -> float:
    """Seconds to read and decode one of the images."""
    images = FileImages(files.source, preprocess, files.rows[:TIMED_IMAGES], files.on_bad_image)
    some = list(range(len(images)))
    images.__getitems__(some)  # opens files and libraries
    start = time.perf_counter()
    images.__getitems__(some)
    return (time.perf_counter() - start) / max(len(some), 1)


@torch.no_grad()
def _patches(vlm: VLM) -> int:
    side = vlm.preprocessing.framing.size
    return encode_patches(vlm, torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]


@torch.no_grad()
def _timed(vlm: VLM) -> tuple[float, int]:
    side = vlm.preprocessing.framing.size
    images = torch.randint(256, (TIMED_IMAGES, 3, side, side), dtype=torch.uint8)
    vlm.eval().encode_image(images[:1])
    start = time.perf_counter()
    features = vlm.encode_image(images)
    return (time.perf_counter() - start) / TIMED_IMAGES, int(features.shape[-1])
