"""The embedded evaluation sets: every reliability dimension on real images that ship with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import skimage.data
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.registry import Registry
from lightning_vlmq.data.corruptions import corrupt
from lightning_vlmq.data.embedded.captions import COLOURS
from lightning_vlmq.data.embedded.compose import (
    CLASS_NAMES,
    SIZE,
    TRAINED,
    Garments,
    compose,
    draw_colours,
    trained_mask,
)
from lightning_vlmq.data.images.encoded import OnBadImage, decode_images, read_parquet
from lightning_vlmq.data.renditions import rendition
from lightning_vlmq.data.sets import EvalSet, TensorImages

FOLDER = Path(__file__).parent
_TEXTURES = ("brick", "grass", "gravel")


@dataclass(frozen=True)
class Recipe:
    """What the evaluation sets are made of; see :class:`~lightning_vlmq.data.embedded.EmbeddedData` for the fields."""

    path: str
    per_class: int
    per_class_shifted: int
    n_far_ood: int
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    renditions: tuple[str, ...]
    data_seed: int
    on_bad_image: OnBadImage

    def generator(self, stream: int) -> torch.Generator:
        """An independent random stream; every set draws from its own, so adding one never changes another."""
        return torch.Generator().manual_seed(self.data_seed * 1000 + stream)


DATASETS: Registry[Callable[[Recipe], list[EvalSet]]] = Registry("data set")


@lru_cache(maxsize=64)
def build_sets(name: str, recipe: Recipe) -> list[EvalSet]:
    """The evaluation sets of one group of :data:`DATASETS`, built once a process. Raises :class:`VLMQError` for an unknown group."""
    return DATASETS[name](recipe)


@lru_cache(maxsize=4)
def read_pairs(folder: str, on_bad_image: OnBadImage) -> TensorImages:
    """The image-caption pairs of ``folder/pairs.parquet``."""
    path = Path(folder) / "pairs.parquet"
    table = read_parquet(path, ["image", "caption"])
    images, rows = decode_images(table["image"].to_pylist(), path, "RGB", on_bad_image)
    return TensorImages(images, caption=table.take(rows.numpy())["caption"].to_pylist())


@DATASETS.register("garments")
def _garments(recipe: Recipe) -> list[EvalSet]:
    garments = _trained(recipe, recipe.per_class)
    return [EvalSet("garments", "id", _composed(garments, 1.0, recipe.generator(1)))]


@DATASETS.register("held_out")
def _held_out(recipe: Recipe) -> list[EvalSet]:
    garments = _read_garments(recipe.path, recipe.on_bad_image)
    garments = garments.select(~trained_mask(garments.labels))
    return [EvalSet("held_out", "near_ood", _composed(garments, 0.0, recipe.generator(2), ood=True))]


@DATASETS.register("digits")
def _digits(recipe: Recipe) -> list[EvalSet]:
    digits = torch.from_numpy(load_digits().images[: recipe.n_far_ood]).float()[:, None] * (255 / 16)
    images = F.interpolate(digits, size=(28, 28), mode="bilinear").squeeze(1).round().to(torch.uint8)
    labels = torch.full((len(images),), CLASS_NAMES.index("shirt"))  # of no colour of its own: any background
    return [EvalSet("digits", "far_ood", _composed(Garments(images, labels), 0.0, recipe.generator(3), ood=True))]


@DATASETS.register("textures")
def _textures(recipe: Recipe) -> list[EvalSet]:
    """Patches of brick, grass and gravel, tinted with the palette so that colour alone does not give them away."""
    generator = recipe.generator(4)
    photos = torch.from_numpy(np.stack([getattr(skimage.data, name)() for name in _TEXTURES])).float() / 255
    patch = 2 * SIZE
    which = torch.arange(recipe.n_far_ood) % len(_TEXTURES)
    corners = torch.randint(0, photos.shape[-1] - patch, (recipe.n_far_ood, 2), generator=generator).tolist()
    grey = torch.stack([photos[k, y : y + patch, x : x + patch] for k, (y, x) in zip(which.tolist(), corners)])[:, None]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    tint = palette[torch.randint(0, len(palette), (recipe.n_far_ood,), generator=generator)][:, :, None, None]
    images = (F.avg_pool2d(grey, 2) * tint * 1.3).clamp(0, 255).round().to(torch.uint8)
    return [EvalSet("textures", "far_ood", TensorImages(images, target=torch.full((len(images),), -1)))]


@DATASETS.register("corruptions")
def _corruptions(recipe: Recipe) -> list[EvalSet]:
    """The corrupted images, after those that they were made of (severity 0), whose error the relative corruption error needs."""
    base = _composed(_trained(recipe, recipe.per_class_shifted), 1.0, recipe.generator(5))
    seeds = torch.arange(len(base)) + recipe.data_seed * 1_000_003
    corrupted = [
        EvalSet(
            f"{name}_{severity}",
            "corruption",
            _with(base, corrupt(base.images, name, severity, seeds)),
            name,
            severity,
            group="corruptions",
        )
        for name in recipe.corruptions
        for severity in recipe.severities
    ]
    return [EvalSet("corruptions_clean", "corruption", base, group="corruptions"), *corrupted]


@DATASETS.register("renditions")
def _renditions(recipe: Recipe) -> list[EvalSet]:
    base = _composed(_trained(recipe, recipe.per_class_shifted), 1.0, recipe.generator(6))
    return [
        EvalSet(name, "shift", _with(base, rendition(base.images, name)), name, group="renditions")
        for name in recipe.renditions
    ]


@DATASETS.register("backgrounds")
def _backgrounds(recipe: Recipe) -> list[EvalSet]:
    garments = _trained(recipe, max(recipe.per_class // 2, 1))
    return [
        EvalSet(f"backgrounds_{name}", "spurious", _composed(garments, share, recipe.generator(7)), group="backgrounds")
        for name, share in (("common", 1.0), ("counter", 0.0))
    ]


@lru_cache(maxsize=4)
def _read_garments(folder: str, on_bad_image: OnBadImage) -> Garments:
    path = Path(folder) / "garments.parquet"
    table = read_parquet(path, ["image", "label"])
    images, rows = decode_images(table["image"].to_pylist(), path, "L", on_bad_image)
    labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))[rows]
    if not ((labels >= 0) & (labels < len(CLASS_NAMES))).all():
        raise VLMQError(f"labels in '{path}' must lie in 0..{len(CLASS_NAMES) - 1}; repair the file")
    return Garments(images, labels)


def _trained(recipe: Recipe, per_class: int) -> Garments:
    """The first ``per_class`` garments of each trained class, in file order."""
    garments = _read_garments(recipe.path, recipe.on_bad_image)
    garments = garments.select(trained_mask(garments.labels))
    one_hot = F.one_hot(garments.labels, len(CLASS_NAMES))
    rank = (one_hot.cumsum(0) * one_hot).sum(1)
    return garments.select(rank <= per_class)


def _composed(garments: Garments, share_common: float, generator: torch.Generator, ood: bool = False) -> TensorImages:
    colours = draw_colours(garments.labels, share_common, generator)
    images = compose(garments.images, colours, generator)
    return TensorImages(images, target=torch.full((len(images),), -1) if ood else _class_index(garments.labels))


def _class_index(labels: Tensor) -> Tensor:
    """Fashion-MNIST labels as indices into the trained classes, int64 ``[n]``."""
    table = torch.tensor([TRAINED.index(name) if name in TRAINED else -1 for name in CLASS_NAMES])
    return table[labels]


def _with(base: TensorImages, images: Tensor) -> TensorImages:
    return TensorImages(images, **base.columns)
