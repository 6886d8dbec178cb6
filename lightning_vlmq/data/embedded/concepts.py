"""The embedded benchmark's concepts and the drawings of them, as the package's files hold them.

A concept is an emoji of Unicode, a house is a set of artwork that draws it; ``ATTRIBUTION.md`` names authors and licences.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.encoded import OnBadImage, decode_images, read_parquet

FOLDER = Path(__file__).parent
DRAWING = 48  # pixels of a committed drawing
TRAINING_DRAWING = 64  # pixels of a training drawing, which is scaled down at random
PARTS = ("id", "unseen", "house", "pictogram", "pairs", "train")


@dataclass(frozen=True)
class Concept:
    """A class.

    Attributes:
        name: its Unicode (CLDR) short name.
        keywords: CLDR's keywords; may be empty.
        group: one of Unicode's groups, in lower case.
        trained: whether any drawing of it is trained on.
    """

    name: str
    keywords: tuple[str, ...]
    group: str
    trained: bool


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All concepts: the trained ones first, each part in order of name."""
    rows = json.loads((FOLDER / "concepts.json").read_text(encoding="utf-8"))
    return tuple(Concept(r["name"], tuple(r["keywords"]), r["group"], r["trained"]) for r in rows)


def class_names(trained: bool = True) -> tuple[str, ...]:
    """The names of the trained concepts, or of those never trained."""
    return tuple(c.name for c in concepts() if c.trained == trained)


@lru_cache(maxsize=1)
def groups() -> tuple[str, ...]:
    """Unicode's groups, in order of name."""
    return tuple(sorted({c.group for c in concepts()}))


def group_of(concept: Tensor) -> Tensor:
    """The group of each concept, indices into :func:`groups`, int64 as ``concept`` (indices into :func:`concepts`; -1 stays)."""
    table = torch.tensor([*(groups().index(c.group) for c in concepts()), -1])
    return table[concept]


@dataclass(frozen=True)
class Drawings:
    """Drawings on transparent ground.

    Attributes:
        images: RGBA, uint8 ``[n, 4, size, size]``.
        concept: indices into :func:`concepts`, int64 ``[n]``; -1 where a drawing shows none of them.
        house: who drew each.
    """

    images: Tensor
    concept: Tensor
    house: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Tensor) -> Drawings:
        """The drawings where a boolean or index tensor points."""
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return Drawings(self.images[index], self.concept[index], tuple(self.house[i] for i in index.tolist()))

    def of_house(self, house: str) -> Drawings:
        """Those of one house."""
        return self.select(torch.tensor([h == house for h in self.house], dtype=torch.bool))

    def cells(self) -> set[tuple[int, str]]:
        """The (concept, house) cells."""
        return set(zip(self.concept.tolist(), self.house))


@lru_cache(maxsize=16)
def read_drawings(
    path: str, part: str, on_bad_image: OnBadImage = "error", only: frozenset[str] | None = None
) -> Drawings:
    """One part of a file of drawings, in file order.

    Args:
        path: a Parquet file with the columns ``part``, ``concept`` (name), ``house`` and ``image`` (encoded RGBA).
        part: one of :data:`PARTS`.
        on_bad_image: see :func:`~lightning_vlmq.data.images.encoded.decode_images`.
        only: names of the concepts whose drawings are wanted; ``None`` takes all.

    Raises:
        VLMQError: the file is missing, damaged, or lacks the part.
    """
    table = read_parquet(Path(path), ["part", "concept", "house", "image"])
    cells = zip(table["part"].to_pylist(), table["concept"].to_pylist())
    rows = [i for i, (p, concept) in enumerate(cells) if p == part and (only is None or concept in only)]
    if not rows:
        raise VLMQError(f"'{path}' holds no drawings of the part '{part}'; make it again: make data")
    table = table.take(rows)
    images, readable = decode_images(table["image"].to_pylist(), Path(path), "RGBA", on_bad_image)
    index = {c.name: i for i, c in enumerate(concepts())}
    table = table.take(readable.numpy())
    concept = torch.tensor([index.get(name, -1) for name in table["concept"].to_pylist()])
    return Drawings(images, concept, tuple(table["house"].to_pylist()))


@lru_cache(maxsize=4)
def require_apart(path: str) -> None:
    """Check that no drawing of the caption pairs is evaluated: neither its (concept, house) cell, nor its file in another.

    Scenes of one drawing differ in their backgrounds, so comparing scenes would not tell.

    Raises:
        VLMQError: some are; the file is missing or damaged.
    """
    table = read_parquet(Path(path), ["part", "concept", "house", "image"])
    columns = [table[name].to_pylist() for name in ("part", "concept", "house", "image")]
    evaluated: dict[Any, int] = {}
    for row, (part, concept, house, image) in enumerate(zip(*columns)):
        if part in ("id", "unseen", "house"):
            evaluated |= {(concept, house): row, image: row}
    pairs = [row for row, part in enumerate(columns[0]) if part == "pairs"]
    keys = {row: ((columns[1][row], columns[2][row]), columns[3][row]) for row in pairs}
    if both := [(row, evaluated[key]) for row in pairs for key in keys[row] if key in evaluated]:
        raise VLMQError(
            f"'{path}': {len({row for row, _ in both})} of {len(pairs)} drawings of the caption pairs are evaluated too, row {both[0][0]} "
            f"is row {both[0][1]}; make the file again"
        )
