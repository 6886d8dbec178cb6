"""The OOD sets of OpenOOD v1.5's ImageNet-1k benchmark (Zhang et al. 2023), by its image lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_vlmq.core.errors import unknown
from lightning_vlmq.data.images.sources import FileTree
from lightning_vlmq.data.readers.base import Reader, Reading, read_list
from lightning_vlmq.data.readers.names import OF_IMAGENET
from lightning_vlmq.data.sets import EvalSet


@dataclass(frozen=True)
class _Listed:
    role: str
    images: str  # the folder that the list's paths start from
    n: int


SETS: Mapping[str, _Listed] = {
    "imagenet": _Listed("id", "images_largescale", 45_000),
    "ssb_hard": _Listed("near_ood", "images_largescale", 49_000),
    "ninco": _Listed("near_ood", "images_largescale", 5_879),
    "inaturalist": _Listed("far_ood", "images_largescale", 10_000),
    "textures": _Listed("far_ood", "images_classic", 5_160),
    "openimage_o": _Listed("far_ood", "images_largescale", 15_869),
}
"""What OpenOOD v1.5 tests ImageNet-1k models on; ``imagenet`` is its part of the validation images."""


@dataclass(frozen=True)
class OpenOOD(Reader):
    """Sets of OpenOOD v1.5: ``benchmark_imglist/imagenet/test_<set>.txt``, ``images_largescale``, ``images_classic``.

    Attributes:
        path: OpenOOD's data folder.
        sets: names of :data:`SETS`; ``imagenet`` is the id set of the benchmark and takes the place of :class:`~.imagenet.ImageNet`.
        expected: each list has to have its published length, ``None`` takes what is there.
    """

    path: str = "openood"
    sets: tuple[str, ...] = ("ssb_hard", "ninco", "inaturalist", "textures", "openimage_o")
    expected: Literal["published"] | None = "published"

    def read(self, reading: Reading) -> list[EvalSet]:
        """A set a list."""
        folder = reading.folder(self.path)
        if strangers := [name for name in self.sets if name not in SETS]:
            raise unknown("OpenOOD set", strangers[0], SETS)
        found = []
        for name in self.sets:
            listed = SETS[name]
            path = reading.file(folder / "benchmark_imglist" / "imagenet" / f"test_{name}.txt")
            paths, labels = read_list(path, published=True)
            source = FileTree.of(reading.folder(f"{self.path}/{listed.images}"), paths, path)
            about = OF_IMAGENET if listed.role == "id" else {}
            expected = None if self.expected is None else listed.n
            found.append(reading.eval_set(name, listed.role, source, labels, expected, **about))
        return found
