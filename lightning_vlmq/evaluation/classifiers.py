"""Zero-shot classifiers of a data module's sets."""

from __future__ import annotations

import logging
from functools import partial

from torch import Tensor

from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.evaluation.digests import text_digest
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.models import VLM

log = logging.getLogger(__name__)


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
            made[key] = cache.of(tower, text_digest(*key), partial(vlm.class_features, *key), len(key[0])).to(
                vlm.mean.device
            )
        classifiers[s.name] = made[key] if s.classes is None else made[key][list(s.classes)]
    return classifiers


def warn_of_twin_classes(vlm: VLM, data: ReliabilityDataModule) -> None:
    """Warn of classes that the model cannot tell apart, because their names are the same to its tokenizer.

    A small vocabulary reads every word that it does not know as one and the same; results would look like any other.

    Args:
        vlm: the model.
        data: the data module, set up.
    """
    for names in dict.fromkeys(tuple(s.class_names or data.class_names) for s in data.eval_sets):
        read: dict[tuple[int, ...], list[str]] = {}
        for name, tokens in zip(names, vlm.tokenize(list(names)).tolist()):
            read.setdefault(tuple(tokens), []).append(name)
        twins = [name for same in read.values() if len(same) > 1 for name in same]
        if twins:
            shown = ", ".join(twins[:4]) + (", …" if len(twins) > 4 else "")
            log.warning(
                "%d of %d classes cannot be told apart: their names are the same to the tokenizer of '%s' (%s)",
                len(twins),
                len(names),
                vlm.name,
                shown,
            )
