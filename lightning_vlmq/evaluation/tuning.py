"""What the caption pairs say about a model: features to compare others with, and a better logit scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.evaluation.features import FeatureCache, text_digest
from lightning_vlmq.metrics import LogitScale, fit_logit_scale
from lightning_vlmq.models import VLM

_CHUNK = 256  # captions a batch


@dataclass(frozen=True)
class PairFeatures:
    """A model's unit-norm features of the calibration pairs, on the CPU.

    Attributes:
        images: float32 ``[n, dim]``.
        texts: float32 ``[m, dim]``, of the distinct captions.
        caption: int64 ``[n]``, the caption of each image.
    """

    images: Tensor
    texts: Tensor
    caption: Tensor


@torch.no_grad()
def encode_pairs(vlm: VLM, data: ReliabilityDataModule, cache: FeatureCache, towers: Mapping[str, str]) -> PairFeatures:
    """Run both towers over all calibration pairs, each caption once; what the cache knows is not run again.

    Args:
        vlm: the model, on the device to run on.
        data: the data module, set up.
        cache: where features are kept.
        towers: digest of each tower, see :func:`~lightning_vlmq.evaluation.features.tower_digest`.

    Raises:
        VLMQError: the data module has no pairs, or an evaluation image is among them.
    """
    pairs, batches, device = data.require_disjoint_pairs(), data.calibration_batches(), vlm.mean.device
    captions = [caption for batch in batches for caption in batch["caption"]]
    column = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    distinct = list(column)

    def run_images() -> Tensor:
        return torch.cat([vlm.encode_image(batch["image"].to(device)) for batch in batches if len(batch["image"])])

    def run_texts() -> Tensor:
        parts = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
        return torch.cat([vlm.encode_text(vlm.tokenize(part).to(device)) for part in parts])

    return PairFeatures(
        images=cache.of(towers["vision"], f"pairs_{pairs.digest()}", run_images, len(captions)).cpu(),
        texts=cache.of(towers["text"], text_digest(distinct), run_texts, len(distinct)).cpu(),
        caption=torch.tensor([column[caption] for caption in captions]),
    )


def own_logit_scale(vlm: VLM) -> LogitScale:
    """The scale (and, of a sigmoid model, the bias) that the model came with."""
    return LogitScale(float(vlm.logit_scale()), float(vlm.logit_bias()) if vlm.is_sigmoid else None)


def tuned_logit_scale(vlm: VLM, pairs: PairFeatures) -> LogitScale:
    """Logit scale tuning: the scale (and bias) under which the calibration pairs are most likely; see ``fit_logit_scale``."""
    return fit_logit_scale(pairs.images, pairs.texts, pairs.caption, own_logit_scale(vlm))
