"""What the caption pairs say about a model: features to compare others with, and a better logit scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.evaluation.digests import text_digest
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.metrics import LogitScale, fit_logit_scale, pairs_nll
from lightning_vlmq.models import VLM

log = logging.getLogger(__name__)

FOLDS = 5
"""Of the cross-validation of a tuned logit scale."""
_CHUNK = 256  # captions per batch


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
        towers: digest of each tower, see :func:`~lightning_vlmq.evaluation.digests.tower_digest`.

    Raises:
        VLMQError: the data module has no pairs, or an evaluation image is among them.
    """
    pairs, batches, device = data.require_disjoint_pairs(), data.calibration_batches(), vlm.mean.device
    captions = [caption for batch in batches for caption in batch["caption"]]
    name = f"pairs_{pairs.digest()}_{data.train_batch_size}"
    column = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    distinct = list(column)

    def run_images() -> Tensor:
        return torch.cat([vlm.encode_image(batch["image"].to(device)) for batch in batches if len(batch["image"])])

    def run_texts() -> Tensor:
        parts = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
        return torch.cat([vlm.encode_text(vlm.tokenize(part).to(device)) for part in parts])

    return PairFeatures(
        images=cache.of(towers["vision"], name, run_images, len(captions)).cpu(),
        texts=cache.of(towers["text"], text_digest(distinct), run_texts, len(distinct)).cpu(),
        caption=torch.tensor([column[caption] for caption in captions]),
    )


def own_logit_scale(vlm: VLM) -> LogitScale:
    """The scale (and, of a sigmoid model, the bias) that the model came with."""
    return LogitScale(float(vlm.logit_scale()), float(vlm.logit_bias()) if vlm.is_sigmoid else None)


@dataclass(frozen=True)
class TunedLogitScale:
    """A logit scale fitted on all calibration pairs, and what fitting it does to pairs that were not used for it.

    Attributes:
        scale: the fitted one.
        nll_before: NLL per pair of the scale that the model came with, in nats; NaN where there are too few captions to hold
            any out.
        nll_after: the same of scales that were fitted without the pairs that they are judged on.
    """

    scale: LogitScale
    nll_before: float
    nll_after: float


def tune_logit_scale(vlm: VLM, pairs: PairFeatures) -> TunedLogitScale:
    """Logit scale tuning: the scale under which the calibration pairs are most likely; see ``fit_logit_scale``.

    Cross-validated over :data:`FOLDS` folds of captions (a caption's pairs stay together): the likelihood of held-out pairs
    says whether there is anything to gain. A warning where it gets worse.
    """
    start = own_logit_scale(vlm)
    fitted = fit_logit_scale(pairs.images, pairs.texts, pairs.caption, start)
    before, after = _held_out_nll(pairs, start)
    if after > before:
        log.warning(
            "tuning the logit scale of '%s' (%.4g to %.4g) makes held-out caption pairs less likely: NLL %.4f before, %.4f after; "
            "take more pairs, or leave the scale as it is",
            vlm.name,
            start.scale,
            fitted.scale,
            before,
            after,
        )
    return TunedLogitScale(fitted, before, after)


def _held_out_nll(pairs: PairFeatures, start: LogitScale) -> tuple[float, float]:
    """Mean NLL of the pairs, each in its fold, with the scale at the start and with the one fitted on the other folds."""
    n_captions = int(pairs.caption.max()) + 1
    folds = min(FOLDS, n_captions // 2)  # at least two captions a fold: one alone has no negatives
    if folds < 2:
        return math.nan, math.nan
    before, after = 0.0, 0.0
    for fold in range(folds):
        held = pairs.caption % folds == fold
        others = (pairs.images[~held], pairs.texts, pairs.caption[~held])
        own = (pairs.images[held], pairs.texts, pairs.caption[held])
        share = float(held.double().mean())
        before += share * pairs_nll(*own, start.scale)
        after += share * pairs_nll(*own, fit_logit_scale(*others, start).scale)
    return before, after
