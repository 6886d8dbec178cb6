"""The guard between calibration and evaluation: no image may be on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_vlmq.errors import VLMQError

if TYPE_CHECKING:
    from lightning_vlmq.data.datamodule import EvalSet, ImageSet

LEVELS = ("file", "stored", "shown")
"""What two image sets can be compared by, best first: encoded bytes, pixels as stored, pixels as a batch holds them."""


@dataclass(frozen=True)
class Fingerprints:
    """How to recognise the images of a set at one of the :data:`LEVELS`.

    Attributes:
        cheap: a number an image, float64 ``[n]``, equal for equal images and quick to have (a size); NaN equals nothing.
        exact: a hash of one image by its row; asked only where the cheap numbers of two sets agree.
        name: what to call an image in a message, by its row.
    """

    cheap: Callable[[], NDArray[np.float64]]
    exact: Callable[[int], bytes]
    name: Callable[[int], str]


def pixel_hash(pixels: NDArray[Any]) -> bytes:
    """Hash of an image's shape and pixels."""
    return blake2b(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def shown(images: Tensor) -> Fingerprints:
    """Fingerprints of images in memory, uint8 ``[n, 3, height, width]``."""
    return Fingerprints(
        cheap=lambda: np.full(len(images), float(images[:1].numel())),
        exact=lambda row: pixel_hash(images[row].numpy()),
        name=lambda row: f"row {row}",
    )


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
