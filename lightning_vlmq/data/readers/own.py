"""Data sets of one's own: a folder a class, an image list, Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.images.archives import ParquetRows
from lightning_vlmq.data.images.encoded import read_parquet
from lightning_vlmq.data.images.sources import FileTree
from lightning_vlmq.data.readers.base import Reader, Reading, class_folders, read_list, subfolders
from lightning_vlmq.data.readers.names import TEMPLATES, resolve_class_names, resolve_templates
from lightning_vlmq.data.sets import EvalSet

Words = str | list[str] | None


@dataclass(frozen=True)
class Folder(Reader):
    """Images in one folder a class, ``<class>/*.jpg``; for an OOD role any images below the folder.

    The classes are the names of the folders, sorted, unless ``class_names`` says more.

    Attributes:
        path: the folder.
        name: the set's name.
        role: its role.
        class_names: what the class folders, in sorted order, are called in prompts; or a name of such a list, or a file of them.
        templates: prompts for these classes, which then need not be the id set's.
        expected: number of images, ``None`` takes what is there.
    """

    path: str
    name: str
    role: str
    class_names: Words = None
    templates: Words = None
    expected: int | None = None

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set."""
        folder = reading.folder(self.path)
        if ROLES[self.role].is_ood:
            source = FileTree.scan(folder)
            return [reading.eval_set(self.name, self.role, source, [-1] * len(source), self.expected)]
        folders = sorted(subfolders(folder))
        if not folders:
            raise VLMQError(f"'{folder}' has no class folders; put the images of each class into a folder of its name")
        names = tuple(folders) if self.class_names is None else resolve_class_names(self.class_names)
        if len(names) != len(folders):
            raise VLMQError(
                f"'{folder}' has {len(folders)} class folders, class_names are {len(names)}; name each once"
            )
        source, labels = class_folders(folder, {name: label for label, name in enumerate(folders)}, complete=True)
        about = _about(names, self.templates, self.role)
        return [reading.eval_set(self.name, self.role, source, labels, self.expected, **about)]


@dataclass(frozen=True)
class ImageList(Reader):
    """Images by a list, a line an image: its path and its label (a number from 0), as OpenOOD's lists are.

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
        label: column of the labels: numbers from 0, or names, whose sorted order then makes the numbers.
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
        paths = sorted(given.glob("*.parquet")) if given.is_dir() else [reading.file(self.path)]
        if not paths:
            raise VLMQError(f"'{given}' holds no Parquet file; name the folder or file that does")
        source = ParquetRows(paths, self.image)
        if ROLES[self.role].is_ood:
            return [reading.eval_set(self.name, self.role, source, [-1] * len(source), self.expected)]
        columns = [self.label] + ([] if self.class_name is None else [self.class_name])
        table = pa.concat_tables([read_parquet(path, columns) for path in paths])
        values = table[self.label].to_numpy()
        labels, names = values, None
        if not np.issubdtype(values.dtype, np.number):
            distinct, labels = np.unique(values.astype(str), return_inverse=True)
            names = tuple(distinct.tolist())
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


def _names(labels: Any, names: Sequence[str], path: Path) -> tuple[str, ...]:
    """The class name of each label 0, 1, …; raises :class:`VLMQError` where a label has none, or two."""
    found = sorted(set(zip(labels.tolist(), names)))
    if [label for label, _ in found] != list(range(len(found))):
        twice = next((a for a, b in pairwise(found) if a[0] == b[0]), None)
        what = f"label {twice[0]} has several names" if twice else f"labels are not 0..{len(found) - 1}"
        raise VLMQError(f"class names do not match the labels in '{path}': {what}; give a name to each label from 0 on")
    return tuple(str(name) for _, name in found)
