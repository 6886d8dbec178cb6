"""Data sets of one's own: one folder per class, an image list, Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.images.archives import ParquetRows
from lightning_vlmq.data.images.encoded import read_parquet
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.pixels import UnreadableImage
from lightning_vlmq.data.images.sources import FileTree
from lightning_vlmq.data.readers.base import (
    Reader,
    Reading,
    class_folders,
    files_in,
    read_list,
    require_images,
    subfolders,
)
from lightning_vlmq.data.readers.names import (
    TEMPLATES,
    class_order,
    name_classes,
    resolve_class_names,
    resolve_templates,
)
from lightning_vlmq.data.sets import EvalSet

Words = str | list[str] | None
ClassWords = str | list[str] | dict[str, str] | None


@dataclass(frozen=True)
class Folder(Reader):
    """Images in one folder per class, ``<class>/*.jpg``; for an OOD role any images below the folder.

    The classes are the names of the folders, unless ``class_names`` says more. Folders whose names are all whole numbers are in
    the order of the numbers, others in that of their names as text.

    Attributes:
        path: the folder.
        name: the set's name.
        role: its role.
        class_names: what the class folders are called in prompts: names by folder, or one name per folder in their order, or a name of
            such a list, or a file of them. How they were matched is said.
        templates: prompts for these classes, which then need not be the id set's.
        expected: number of images, ``None`` takes what is there.
    """

    path: str
    name: str
    role: str
    class_names: ClassWords = None
    templates: Words = None
    expected: int | None = None

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set."""
        folder = reading.folder(self.path)
        if ROLES[self.role].is_ood:
            source = FileTree.scan(folder)
            return [reading.eval_set(self.name, self.role, source, [-1] * len(source), self.expected)]
        folders = class_order(subfolders(folder), f"'{folder}'")
        if not folders:
            raise VLMQError(f"'{folder}' has no class folders; put the images of each class into a folder of its name")
        names = (
            folders
            if self.class_names is None
            else name_classes(folders, self.class_names, f"'{folder}'", "class folders")
        )
        source, labels = class_folders(folder, {name: label for label, name in enumerate(folders)}, complete=True)
        require_images(folder, folders, labels)
        if reading.on_bad_image == "skip":
            _require_readable(reading.images(source, target=torch.from_numpy(labels)), folders, folder)
        about = _about(names, self.templates, self.role)
        return [reading.eval_set(self.name, self.role, source, labels, self.expected, **about)]


@dataclass(frozen=True)
class ImageList(Reader):
    """Images by a list, one line per image: its path and its label (a number from 0), as OpenOOD's lists are.

    Attributes:
        path: the list.
        name: the set's name.
        role: its role; in OOD sets labels count for nothing.
        images: folder that the list's paths start from; by default the list's own.
        class_names: the classes in label order, or a name of such a list, or a file of them; by default the id set's.
        templates: prompts for these classes, which then need not be the id set's.
        expected: number of images, ``None`` takes what is there.
    """

    path: str
    name: str
    role: str
    images: str | None = None
    class_names: Words = None
    templates: Words = None
    expected: int | None = None

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set."""
        path = reading.file(self.path)
        paths, labels = read_list(path)
        source = FileTree.of(path.parent if self.images is None else reading.folder(self.images), paths, path)
        names = None if self.class_names is None else resolve_class_names(self.class_names)
        about = {} if names is None else _about(names, self.templates, self.role)
        return [reading.eval_set(self.name, self.role, source, labels, self.expected, **about)]


@dataclass(frozen=True)
class Parquet(Reader):
    """Encoded images in Parquet: a column of images, one of labels, and perhaps one of class names.

    Attributes:
        path: a file, or a folder of files, which are taken in the order of their names.
        name: the set's name.
        role: its role; OOD sets need no labels.
        image: column of the images, as bytes or as Hugging Face writes them.
        label: column of the labels: whole numbers from 0, or names, whose order then makes the numbers (that of the numbers, where
            all names are whole numbers).
        class_name: column of the class names; by default labels that are names are the class names, and numbers take the id set's.
        templates: prompts for these classes, which then need not be the id set's.
        expected: number of images, ``None`` takes what is there.
    """

    path: str
    name: str
    role: str
    image: str = "image"
    label: str = "label"
    class_name: str | None = None
    templates: Words = None
    expected: int | None = None

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set."""
        given = reading.root / self.path
        paths = files_in(given, "*.parquet") if given.is_dir() else [reading.file(self.path)]
        if not paths:
            raise VLMQError(f"'{given}' holds no Parquet file; name the folder or file that does")
        source = ParquetRows(paths, self.image)
        if ROLES[self.role].is_ood:
            return [reading.eval_set(self.name, self.role, source, [-1] * len(source), self.expected)]
        columns = [self.label] + ([] if self.class_name is None else [self.class_name])
        parts = [read_parquet(path, columns) for path in paths]
        for path, part in zip(paths, parts):
            if not part.schema.equals(parts[0].schema):
                raise VLMQError(
                    f"columns {', '.join(columns)} are of another type in '{path}' than in '{paths[0]}'; write them alike"
                )
        table = pa.concat_tables(parts)
        labels, names = _labels(table[self.label], f"column {self.label} of '{given}'")
        if self.class_name is not None:
            names = _names(labels, table[self.class_name].to_pylist(), given)
        about = {} if names is None else _about(names, self.templates, self.role)
        return [reading.eval_set(self.name, self.role, source, labels, self.expected, **about)]


def _about(names: Sequence[str], templates: Words, role: str) -> dict[str, Any]:
    """The classes as fields of an evaluation set; only an id set has prompts without being given any."""
    default = TEMPLATES["photo"] if role == "id" else None
    return {
        "class_names": tuple(names),
        "templates": default if templates is None else resolve_templates(templates),
    }


def _labels(column: pa.ChunkedArray, where: str) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Labels as numbers, and the classes' names where the labels are names.

    Raises:
        VLMQError: a label that is missing, a number that is not whole, or a type that is neither.
    """
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise VLMQError(f"{column.null_count} labels in {where} are missing, the first in row {row}; label every image")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        words = column.to_pylist()
        if blank := [row for row, word in enumerate(words) if not word.strip()]:
            raise VLMQError(f"{len(blank)} labels in {where} are blank, the first in row {blank[0]}; label every image")
        names = class_order(words, where)
        rank = {name: label for label, name in enumerate(names)}
        return np.array([rank[word] for word in words], dtype=np.int64), names
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise VLMQError(f"{where} holds {kind}, not labels; give whole numbers from 0, or names")
    values = column.to_numpy()
    if odd := np.flatnonzero(~((values == np.floor(values)) & (np.abs(values) < 2**53))).tolist():
        raise VLMQError(
            f"label {values[odd[0]]} in row {odd[0]} of {where} is no whole number; give labels from 0, or names"
        )
    return values.astype(np.int64), None


def _require_readable(images: FileImages, folders: Sequence[str], where: Path) -> None:
    """Check that each class has an image that can be decoded, where others are left out. Decodes about one image a class."""
    target = images.columns["target"]
    for label, folder in enumerate(folders):
        for row in np.flatnonzero(np.asarray(target) == label).tolist():
            try:
                images.decode(row)
                break
            except UnreadableImage:
                continue
        else:
            raise VLMQError(
                f"none of the images in class folder '{where / folder}' can be read; repair them, or move it away"
            )


def _names(labels: Any, names: Sequence[str], path: Path) -> tuple[str, ...]:
    """The class name of each label 0, 1, …; raises :class:`VLMQError` where a label has none, or two."""
    if unnamed := [row for row, name in enumerate(names) if not isinstance(name, str) or not name.strip()]:
        raise VLMQError(f"{len(unnamed)} class names in '{path}' are missing or no text, the first in row {unnamed[0]}")
    found = sorted(set(zip(labels.tolist(), names)))
    if [label for label, _ in found] != list(range(len(found))):
        twice = next((a for a, b in pairwise(found) if a[0] == b[0]), None)
        what = f"label {twice[0]} has several names" if twice else f"labels are not 0..{len(found) - 1}"
        raise VLMQError(f"class names do not match the labels in '{path}': {what}; give a name to each label from 0 on")
    return tuple(name for _, name in found)
