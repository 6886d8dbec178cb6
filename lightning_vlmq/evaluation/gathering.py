"""What a validation has at its end: the records of all processes, all of them, of models that have not collapsed; new features filed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.judged import Judged, Records
from lightning_vlmq.results.identity import why_partial

log = logging.getLogger(__name__)


def gather(trainer: Any, models: Mapping[str, Judged], sets: Sequence[EvalSet]) -> None:
    """Fill every model's records with what all processes saw, and keep the features that the cache did not know.

    Args:
        trainer: whose processes these are; of a run that sees less than all data, nothing is asked for that it has not seen.
        models: by what they are called in warnings; all saw the same samples.
        sets: the evaluation sets.

    Raises:
        VLMQError: samples are missing or doubled.
    """
    for judged in models.values():
        judged.gather()
    is_whole = not why_partial(trainer)
    if is_whole:
        require_complete(sets, next(iter(models.values())).own.records)
    for what, judged in models.items():
        if trainer.is_global_zero:
            warn_of_collapse(judged, what, sets)
        if trainer.world_size == 1:
            judged.keep_features()
        elif is_whole:
            judged.share_features(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)


def require_complete(sets: Sequence[EvalSet], records: Records) -> None:
    """Warn of images that were left out because they cannot be read.

    Raises:
        VLMQError: samples are missing or doubled for any other reason, or all of a set's.
    """
    for s in sets:
        missing = len(s.images) - len(records[s.name]["index"])
        if missing == 0:
            continue
        if getattr(s.images, "on_bad_image", "error") != "skip" or missing < 0:
            raise VLMQError(
                f"data set '{s.name}' has {len(s.images)} samples, {len(records[s.name]['index'])} were evaluated; "
                "leave sharding to the data module (trainer.use_distributed_sampler: false)"
            )
        if missing == len(s.images):
            raise VLMQError(f"none of the {missing} images of data set '{s.name}' can be read; repair the files")
        log.warning("%d of %d images of '%s' cannot be read and are left out", missing, len(s.images), s.name)


def warn_of_collapse(judged: Judged, what: str, sets: Sequence[EvalSet]) -> None:
    """Warn where features are finite, of unit length, and all the same: the metrics of such a model look like any other's.

    Images are told by what was recorded of them: one prediction with one confidence and one value of each score.

    Args:
        judged: gathered.
        what: what the model is called in the warning.
        sets: the evaluation sets.
    """
    alike: dict[str, list[str]] = {}
    for s in sets:
        records, classifier = judged.own.records[s.name], judged.classifier(s)
        if len(classifier) < 2 or len(records["index"]) < 2:
            continue
        told = [column for name, column in records.items() if name in ("confidence", *judged.own.scores)]
        if float((classifier @ classifier[0]).min()) > 1 - 1e-6:
            alike.setdefault("classes", []).append(s.name)
        elif len(records["prediction"].unique()) == 1 and all(map(_is_constant, told)):
            alike.setdefault("images", []).append(s.name)
    for kind, names in alike.items():
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        log.warning(
            "%s: all %s have one and the same feature on %d of %d data sets (%s); numbers of a collapsed model mean nothing: take more "
            "bits, another method, or other weights",
            *(what, kind, len(names), len(sets), shown),
        )


def _is_constant(column: Tensor) -> bool:
    return float(column.max() - column.min()) <= 1e-5 * float(column.abs().max())
