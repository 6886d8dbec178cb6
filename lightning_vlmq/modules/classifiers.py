"""Zero-shot classifiers of a data module's sets."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.models import VLM
from lightning_vlmq.modules.features import FeatureCache, text_digest


def zero_shot_classifiers(vlm: VLM, data: ReliabilityDataModule, cache: FeatureCache, tower: str) -> dict[str, Tensor]:
    """One classifier an evaluation set: over the data module's classes, over some of them, or over the set's own.

    Args:
        vlm: the model; its text tower runs once for each distinct combination of class names and prompts that the cache does not know.
        data: the data module, set up.
        cache: where class features are kept.
        tower: the text tower's digest.

    Returns:
        Unit-norm class features by set name, float32 ``[classes, dim]``; row ``k`` belongs to target ``k`` of the set.
    """
    made: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}
    classifiers = {}
    for s in data.eval_sets:
        key = tuple(s.class_names or data.class_names), tuple(s.templates or data.templates)
        if key not in made:
            made[key] = cache.of(tower, text_digest(*key), partial(vlm.class_features, *key)).to(vlm.mean.device)
        classifiers[s.name] = made[key] if s.classes is None else made[key][list(s.classes)]
    return classifiers
