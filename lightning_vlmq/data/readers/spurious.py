"""Sets with a spurious cue, as pairs of a common and a counter set: CounterAnimal, Waterbirds, CelebA."""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.sources import FileTree
from lightning_vlmq.data.readers.base import Reader, Reading, subfolders
from lightning_vlmq.data.readers.names import IMAGENET, OF_IMAGENET, TEMPLATES
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.data.text import read_table, read_text


@dataclass(frozen=True)
class CounterAnimal(Reader):
    """CounterAnimal (Wang et al. 2024): ``<ImageNet label> <name>/common-<background>/*.jpg`` and ``counter-<background>``.

    A prediction is one of ImageNet's 1,000 classes (the paper's "1 vs. 1000").

    Attributes:
        path: the folder of the class folders.
        expected: number of common and of counter images, ``None`` takes what is there.
    """

    path: str = "LAION-final"
    expected: tuple[int, int] | None = (7_174, 5_926)

    def read(self, reading: Reading) -> list[EvalSet]:
        """The sets ``counteranimal_common`` and ``counteranimal_counter``."""
        folder = reading.folder(self.path)
        classes = subfolders(folder)
        for name in sorted(classes):
            label = re.match(r"(\d+) ", name)
            if label is None or int(label[1]) >= len(IMAGENET):
                raise VLMQError(f"folder '{name}' in '{folder}' does not start with an ImageNet label; move it away")
        source = FileTree.scan(folder)
        parts = [source.path(row).split("/") for row in range(len(source))]
        sets = []
        for kind, expected in zip(("common", "counter"), self.expected or (None, None)):
            rows = [r for r, part in enumerate(parts) if len(part) > 2 and part[1].startswith(f"{kind}-")]
            halves = classes - {parts[row][0] for row in rows}
            if halves:
                raise VLMQError(f"'{folder / min(halves)}' has no {kind}-<background> images; complete the data set")
            labels = [int(parts[row][0].split(" ")[0]) for row in rows]
            name = f"counteranimal_{kind}"
            sets.append(
                reading.eval_set(name, "spurious", source, labels, expected, rows=torch.tensor(rows), **OF_IMAGENET)
            )
        return sets


@dataclass(frozen=True)
class Waterbirds(Reader):
    """Waterbirds (Sagawa et al. 2020): ``metadata.csv`` with the columns ``img_filename,y,split,place``, and the images it names.

    Common: a landbird on land, a waterbird on water; counter: the others.

    Attributes:
        path: the folder of ``metadata.csv``.
        split: 0 train, 1 validation, 2 test.
        expected: number of images of the split, ``None`` takes what is there.
    """

    path: str = "waterbird_complete95_forest2water2"
    split: int = 2
    expected: int | None = 5_794

    def read(self, reading: Reading) -> list[EvalSet]:
        """The sets ``waterbirds_common`` and ``waterbirds_counter``."""
        listed = reading.file(f"{self.path}/metadata.csv")
        columns = ["img_filename", "y", "split", "place"]
        table = read_table(listed, columns, ",")
        numbers = {name: _small_numbers(table.columns[name], table.lines, name, listed, 3) for name in columns[1:]}
        chosen = np.flatnonzero(numbers["split"] == self.split)
        about = {"class_names": ("landbird", "waterbird"), "templates": TEMPLATES["photo"]}
        y, place = numbers["y"][chosen], numbers["place"][chosen]
        source = FileTree.of(listed.parent, [table.columns["img_filename"][row] for row in chosen.tolist()], listed)
        return _pair(reading, "waterbirds", source, y, place, self.expected, about)


@dataclass(frozen=True)
class CelebA(Reader):
    """CelebA (Liu et al. 2015) as torchvision keeps it: hair colour, with gender as the spurious cue (Sagawa et al. 2020).

    ``list_attr_celeba.txt``, ``list_eval_partition.txt``, ``img_align_celeba/*.jpg``. Common: blond women, dark-haired men; counter:
    blond men, dark-haired women.

    Attributes:
        path: the folder of these files.
        split: 0 train, 1 validation, 2 test.
        expected: number of images of the split, ``None`` takes what is there.
    """

    path: str = "celeba"
    split: int = 2
    expected: int | None = 19_962

    def read(self, reading: Reading) -> list[EvalSet]:
        """The sets ``celeba_common`` and ``celeba_counter``."""
        attributes = reading.file(f"{self.path}/list_attr_celeba.txt")
        partition = reading.file(f"{self.path}/list_eval_partition.txt")
        try:
            table = pd.read_csv(StringIO(read_text(attributes)), sep=r"\s+", skiprows=1)[["Blond_Hair", "Male"]]
            split = pd.read_csv(StringIO(read_text(partition)), sep=r"\s+", header=None, index_col=0)[1]
        except (ValueError, KeyError) as error:
            if isinstance(error, VLMQError):
                raise
            raise VLMQError(
                f"'{attributes}' lacks Blond_Hair and Male, or '{partition}' a split an image; fetch them again"
            ) from error
        if set(table.index) != set(split.index) or not table.index.is_unique or not split.index.is_unique:
            raise VLMQError(f"'{attributes}' and '{partition}' list different images, or one twice; fetch them again")
        if not table.isin((-1, 1)).to_numpy().all() or not split.isin((0, 1, 2)).all():
            raise VLMQError(
                f"'{attributes}' holds other values than -1 and 1, or '{partition}' than 0, 1, 2; fetch them again"
            )
        table = table[split.reindex(table.index) == self.split]
        about = {"class_names": ("dark hair", "blond hair"), "templates": TEMPLATES["person"]}
        source = FileTree.of(reading.folder(f"{self.path}/img_align_celeba"), list(table.index), attributes)
        blond, female = (table["Blond_Hair"] > 0).to_numpy(), (table["Male"] < 0).to_numpy()
        return _pair(reading, "celeba", source, blond, female, self.expected, about)


def _small_numbers(words: list[str], lines: list[int], name: str, path: Path, below: int) -> NDArray[np.int64]:
    """A column of whole numbers 0 .. ``below`` - 1. Raises :class:`VLMQError` for another word, by its line."""
    known = {str(number): number for number in range(below)}
    for word, line in zip(words, lines):
        if word.strip() not in known:
            raise VLMQError(
                f"line {line} of '{path}' has {name} '{word}', not one of {', '.join(known)}; fetch it again"
            )
    return np.array([known[word.strip()] for word in words], dtype=np.int64)


def _pair(
    reading: Reading,
    name: str,
    source: FileTree,
    label: NDArray[Any],
    cue: NDArray[Any],
    expected: int | None,
    about: dict[str, Any],
) -> list[EvalSet]:
    """Common where the cue equals the label (both 0 or 1), counter elsewhere."""
    where = Path(source.folder)
    if len(source) == 0 or (expected is not None and len(source) != expected):
        raise VLMQError(
            f"the split of {name} in '{where}' has {len(source)} images, the published one has {expected}; "
            "complete it, or set expected: null to take what is there"
        )
    label, cue = label.astype(np.int64), cue.astype(np.int64)
    sets = []
    for kind, chosen in (("common", label == cue), ("counter", label != cue)):
        rows = np.flatnonzero(chosen)
        sets.append(
            reading.eval_set(f"{name}_{kind}", "spurious", source, label[rows], rows=torch.from_numpy(rows), **about)
        )
    return sets
