"""The guard between calibration and evaluation: no image may be on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.fingerprints import LEVELS, Fingerprints

if TYPE_CHECKING:
    from lightning_vlmq.data.sets import EvalSet, ImageSet


def find_overlap(a: ImageSet, b: ImageSet) -> list[tuple[str, str]]:
    """The images of ``a`` that are in ``b`` too, exactly.

    Compared is the best of the :data:`LEVELS` that both sets offer.

    Returns:
        Names of one image of ``a`` and its first equal in ``b`` a match, in the order of ``a``.
    """
    mine, theirs = _common_level(a.fingerprints(), b.fingerprints())
    cheap_a, cheap_b = mine.cheap(), theirs.cheap()
    rows_b = np.flatnonzero(np.isin(cheap_b, cheap_a))
    rows_a = np.flatnonzero(np.isin(cheap_a, cheap_b[rows_b]))
    found: dict[bytes, int] = {}
    for row in rows_b.tolist():
        found.setdefault(theirs.exact(row), row)
    matches = ((row, found.get(mine.exact(row))) for row in rows_a.tolist())
    return [(mine.name(row), theirs.name(other)) for row, other in matches if other is not None]


def require_disjoint(pairs: ImageSet, sets: Sequence[EvalSet]) -> None:
    """Check that no image of ``pairs`` is in an evaluation set; a check that has passed once in this process is not repeated.

    Raises:
        VLMQError: naming one such image, how many there are, and the set.
    """
    digest = pairs.digest()
    for s in sets:
        if (digest, s.digest) in _passed:
            continue
        if matches := find_overlap(pairs, s.images):
            mine, theirs = matches[0]
            raise VLMQError(
                f"{len(matches)} of {len(pairs)} calibration images are also in the evaluation set '{s.name}' "
                f"({mine} is {theirs}); what is evaluated must not calibrate or train, take other pairs"
            )
        _passed.add((digest, s.digest))


_passed: set[tuple[str, str]] = set()


def _common_level(a: Mapping[str, Fingerprints], b: Mapping[str, Fingerprints]) -> tuple[Fingerprints, Fingerprints]:
    level = next(level for level in LEVELS if level in a and level in b)  # "shown" is always there
    return a[level], b[level]
