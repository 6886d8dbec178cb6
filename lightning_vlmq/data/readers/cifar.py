"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) and their corrupted versions (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision.datasets
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.sources import ArrayRows
from lightning_vlmq.data.readers.base import Reader, Reading
from lightning_vlmq.data.readers.imagenet import BENCHMARK, check_corruptions
from lightning_vlmq.data.readers.names import CIFAR10, TEMPLATES
from lightning_vlmq.data.sets import EvalSet


@dataclass(frozen=True)
class CIFAR(Reader):
    """CIFAR's test images as torchvision keeps them: ``cifar-10-batches-py`` or ``cifar-100-python``.

    Attributes:
        classes: 10 or 100.
        path: the folder that holds torchvision's folder.
        role: its role.
        expected: number of images, ``None`` takes what is there.
    """

    classes: Literal[10, 100] = 10
    path: str = "cifar"
    role: str = "id"
    expected: int | None = 10_000

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set, ``cifar10`` or ``cifar100``."""
        folder = reading.folder(self.path)
        kind = torchvision.datasets.CIFAR10 if self.classes == 10 else torchvision.datasets.CIFAR100
        try:
            data = kind(str(folder), train=False)
        except (RuntimeError, OSError) as error:
            raise VLMQError(
                f"'{folder / kind.base_folder}' is missing or damaged; unpack {kind.filename} there"
            ) from error
        names = CIFAR10 if self.classes == 10 else tuple(name.replace("_", " ") for name in data.classes)
        source = ArrayRows(data.data, folder / kind.base_folder / kind.test_list[0][0])
        about: dict[str, Any] = {"class_names": names, "templates": TEMPLATES["cifar"]}
        about["group"] = f"cifar{self.classes}"  # CIFAR-C's images are these, in this order
        return [reading.eval_set(f"cifar{self.classes}", self.role, source, data.targets, self.expected, **about)]


@dataclass(frozen=True)
class CIFARC(Reader):
    """CIFAR-10-C or CIFAR-100-C: ``<corruption>.npy``, uint8 ``[50000, 32, 32, 3]``, severity 1 first, and ``labels.npy``.

    Attributes:
        classes: 10 or 100.
        path: the folder of the arrays; by default ``CIFAR-10-C`` or ``CIFAR-100-C``.
        corruptions: which ones; the 15 of the benchmark by default.
        severities: 1..5.
        expected: number of images of each corruption and severity, ``None`` takes what is there.
    """

    classes: Literal[10, 100] = 10
    path: str | None = None
    corruptions: tuple[str, ...] = BENCHMARK
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    expected: int | None = 10_000

    def read(self, reading: Reading) -> list[EvalSet]:
        """One set per corruption and severity, named ``cifar10_c_<corruption>_<severity>``, over the classes of the id set."""
        folder = reading.folder(self.path or f"CIFAR-{self.classes}-C")
        check_corruptions(self.corruptions, self.severities)
        about: dict[str, Any] = {}
        if self.classes == 10:
            about = {"class_names": CIFAR10, "templates": TEMPLATES["cifar"]}
        labels = _array(reading.file(folder / "labels.npy"))
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise VLMQError(
                f"'{folder / 'labels.npy'}' holds {labels.dtype} {list(labels.shape)}, not one whole number an image; fetch it again"
            )
        n, rest = divmod(len(labels), 5)
        sets = []
        for corruption in self.corruptions:
            path = reading.file(folder / f"{corruption}.npy")
            array = _array(path)
            if rest or array.shape != (len(labels), 32, 32, 3) or array.dtype != np.uint8:
                raise VLMQError(
                    f"'{path}' holds {array.dtype} {list(array.shape)}, labels.npy {len(labels)} labels; there must be "
                    "5 equal parts of 32x32 RGB images and a label each; fetch them again"
                )
            source = ArrayRows(array, path)
            for severity in self.severities:
                rows = torch.arange((severity - 1) * n, severity * n)
                sets.append(
                    reading.eval_set(
                        f"cifar{self.classes}_c_{corruption}_{severity}",
                        "corruption",
                        source,
                        labels[rows.numpy()],
                        self.expected,
                        rows=rows,
                        corruption=corruption,
                        severity=severity,
                        group=f"cifar{self.classes}",
                        **about,
                    )
                )
        return sets


def _array(path: Path) -> NDArray[Any]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive of arrays")
        return found
    except (ValueError, OSError, EOFError) as error:
        raise VLMQError(f"'{path}' is damaged or no numpy array; fetch it again") from error
