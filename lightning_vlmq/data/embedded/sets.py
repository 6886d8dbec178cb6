"""The embedded evaluation sets: every reliability dimension on drawings that ship with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import skimage.data
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.registry import Registry
from lightning_vlmq.data.corruptions import corrupt
from lightning_vlmq.data.embedded.concepts import Drawings, concepts, group_of, read_drawings
from lightning_vlmq.data.embedded.scenes import COLOURS, SIZE, backgrounds, compose, draw_colours, place, textures
from lightning_vlmq.data.embedded.wording import Writer
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.renditions import rendition
from lightning_vlmq.data.sets import EvalSet, TensorImages

SHARE_COMMON = 0.9  # of the images on their group's colour, in training and in distribution
HOUSES = {"openmoji": "openmoji", "line": "emojione-monotone", "silhouette": "fluent-emoji-high-contrast"}
PAIRS_BLOCK = 50
_TEXTURES = ("brick", "grass", "gravel")


@dataclass(frozen=True)
class Recipe:
    """What the evaluation sets are made of; see :class:`~lightning_vlmq.data.embedded.EmbeddedData` for the fields."""

    path: str
    n_concepts: int | None
    n_id: int | None
    n_shifted: int
    n_ood: int
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    renditions: tuple[str, ...]
    data_seed: int
    on_bad_image: OnBadImage

    def generator(self, stream: int) -> torch.Generator:
        """An independent random stream; every set draws from its own, so adding one never changes another."""
        return torch.Generator().manual_seed(self.data_seed * 1_000_000_007 + stream)

    def classes(self, trained: bool = True) -> tuple[int, ...]:
        """The concepts that are classes, of those trained or of those never trained: indices into ``concepts()``, in order."""
        known = [i for i, c in enumerate(concepts()) if c.trained == trained]
        n = len(known) if self.n_concepts is None else min(self.n_concepts, len(known))
        return tuple(known[i * len(known) // n] for i in range(n))

    def class_names(self, trained: bool = True) -> tuple[str, ...]:
        """Their names."""
        return tuple(concepts()[i].name for i in self.classes(trained))

    def drawings(self, part: str, limit: int | None = None) -> Drawings:
        """A part of the file, or ``limit`` of its drawings spread evenly over it; none of a concept that is no class.

        Raises:
            VLMQError: the file is missing or damaged, or shows under a labelled part what is no concept of it.
        """
        if part not in ("id", "house", "unseen"):
            drawings = read_drawings(self.path, part, self.on_bad_image)
        else:
            trained = part != "unseen"
            only = None if self.n_concepts is None else frozenset(self.class_names(trained))
            drawings = read_drawings(self.path, part, self.on_bad_image, only)
            strange = (~torch.isin(drawings.concept, torch.tensor(self.classes(trained)))).nonzero().flatten()
            if len(strange):
                raise VLMQError(
                    f"{len(strange)} of {len(drawings)} drawings of the part '{part}' in '{self.path}' show no concept of it, first "
                    f"number {int(strange[0])}; repair the file"
                )
        if limit is None or limit >= len(drawings):
            return drawings
        return drawings.select(torch.arange(limit) * len(drawings) // limit)


DATASETS: Registry[Callable[[Recipe], list[EvalSet]]] = Registry("data set")


@lru_cache(maxsize=64)
def build_sets(name: str, recipe: Recipe) -> list[EvalSet]:
    """The evaluation sets of one group of :data:`DATASETS`, built once a process. Raises for an unknown group."""
    return DATASETS[name](recipe)


def scenes(drawings: Drawings, share_common: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Drawings on backgrounds, each scene from draws of its own.

    The background colours are drawn after everything else, so that two calls with equal generators differ in them alone.

    Returns:
        uint8 ``[n, 3, 64, 64]``, and the colours, indices into :data:`~lightning_vlmq.data.embedded.scenes.COLOURS`, int64 ``[n]``.
    """
    placed = place(drawings.images, generator)
    texture = textures(len(drawings), generator)
    look = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    colours = draw_colours(group_of(drawings.concept), share_common, generator)
    return compose(placed, backgrounds(colours, texture, look)), colours


def _labelled(recipe: Recipe, drawings: Drawings, stream: int, share_common: float = SHARE_COMMON) -> TensorImages:
    images = scenes(drawings, share_common, recipe.generator(stream))[0]
    return TensorImages(images, target=_target(drawings, recipe.classes()))


def _target(drawings: Drawings, classes: tuple[int, ...]) -> Tensor:
    """Concepts as indices into the classes, which are in order and hold them all, int64 ``[n]``."""
    return torch.searchsorted(torch.tensor(classes), drawings.concept)


def _outside(images: Tensor) -> TensorImages:
    return TensorImages(images, target=torch.full((len(images),), -1))


@DATASETS.register("concepts")
def _concepts(recipe: Recipe) -> list[EvalSet]:
    return [EvalSet("concepts", "id", _labelled(recipe, recipe.drawings("id", recipe.n_id), 1))]


@DATASETS.register("unseen")
def _unseen(recipe: Recipe) -> list[EvalSet]:
    """Concepts never trained, twice: among the trained classes they are near-OOD, among themselves a zero-shot test."""
    drawings = recipe.drawings("unseen", recipe.n_ood)
    images = scenes(drawings, 0.0, recipe.generator(2))[0]
    names = recipe.class_names(trained=False)
    own = TensorImages(images, target=_target(drawings, recipe.classes(trained=False)))
    return [
        EvalSet("novel", "near_ood", _outside(images), group="unseen"),
        EvalSet("unseen", "shift", own, class_names=names, group="unseen"),
    ]


@DATASETS.register("digits")
def _digits(recipe: Recipe) -> list[EvalSet]:
    """Handwritten digits of scikit-learn as white ink on the benchmark's backgrounds."""
    ink = torch.from_numpy(load_digits().images[: recipe.n_ood]).float()[:, None] * (255 / 16)
    alpha = F.interpolate(ink, size=(48, 48), mode="bilinear").round().to(torch.uint8)
    drawings = torch.cat([torch.full_like(alpha, 255).expand(-1, 3, -1, -1), alpha], 1)
    return [EvalSet("digits", "far_ood", _outside(scenes(_no_concept(drawings), 0.0, recipe.generator(3))[0]))]


@DATASETS.register("textures")
def _photographs(recipe: Recipe) -> list[EvalSet]:
    """Patches of scikit-image's brick, grass and gravel, tinted with the palette so that colour alone does not give them away."""
    generator = recipe.generator(4)
    photos = torch.from_numpy(np.stack([getattr(skimage.data, name)() for name in _TEXTURES])).float() / 255
    patch = 2 * SIZE
    which = torch.arange(recipe.n_ood) % len(_TEXTURES)
    corners = torch.randint(0, photos.shape[-1] - patch, (recipe.n_ood, 2), generator=generator).tolist()
    grey = torch.stack([photos[k, y : y + patch, x : x + patch] for k, (y, x) in zip(which.tolist(), corners)])[:, None]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    tint = palette[torch.randint(0, len(palette), (recipe.n_ood,), generator=generator)][:, :, None, None]
    return [EvalSet("textures", "far_ood", _outside((F.avg_pool2d(grey, 2) * tint * 1.3).clamp(0, 255).round().byte()))]


@DATASETS.register("pictograms")
def _pictograms(recipe: Recipe) -> list[EvalSet]:
    """Pictograms of a game's interface, none of whose names shares a word with a concept."""
    drawings = recipe.drawings("pictogram", recipe.n_ood)
    return [EvalSet("pictograms", "far_ood", _outside(scenes(drawings, 0.0, recipe.generator(5))[0]))]


@DATASETS.register("corruptions")
def _corruptions(recipe: Recipe) -> list[EvalSet]:
    """The same images uncorrupted (severity 0), then by family and severity."""
    base = _labelled(recipe, recipe.drawings("id", recipe.n_shifted), 6)
    seeds = torch.arange(len(base)) + recipe.data_seed * 1_000_003
    return [
        EvalSet("corruptions_clean", "corruption", base, group="corruptions"),
        *(
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
        ),
    ]


@DATASETS.register("houses")
def _houses(recipe: Recipe) -> list[EvalSet]:
    """Three houses never trained on: one in colour, one of lines, one of silhouettes."""
    drawings = recipe.drawings("house")
    sets = []
    for stream, (name, house) in enumerate(HOUSES.items(), start=20):
        part = drawings.of_house(house)
        n = min(recipe.n_shifted, len(part))
        part = part.select(torch.arange(n) * len(part) // n)
        sets.append(EvalSet(name, "shift", _labelled(recipe, part, stream), name))
    return sets


@DATASETS.register("renditions")
def _renditions(recipe: Recipe) -> list[EvalSet]:
    base = _labelled(recipe, recipe.drawings("id", recipe.n_shifted), 7)
    return [
        EvalSet(name, "shift", _with(base, rendition(base.images, name)), name, group="renditions")
        for name in recipe.renditions
    ]


@DATASETS.register("backgrounds")
def _backgrounds(recipe: Recipe) -> list[EvalSet]:
    """The same drawings, places and textures, on their group's colour and on another group's."""
    drawings = recipe.drawings("id", recipe.n_shifted)
    return [
        EvalSet(f"backgrounds_{name}", "spurious", _labelled(recipe, drawings, 8, share), group="backgrounds")
        for name, share in (("common", 1.0), ("counter", 0.0))
    ]


@lru_cache(maxsize=4)
def read_pairs(path: str, data_seed: int, on_bad_image: OnBadImage, n: int | None = None) -> TensorImages:
    """The first ``n`` calibration pairs, or all: training drawings on scenes of their own, with a clean caption each.

    They are composed in blocks with draws of their own, so that fewer pairs are the first ones of more.
    """
    drawings = read_drawings(path, "pairs", on_bad_image)
    total = len(drawings) if n is None else min(n, len(drawings))
    images, captions, names = [], [], list(COLOURS)
    for number, start in enumerate(range(0, total, PAIRS_BLOCK)):
        block = drawings.select(torch.arange(start, min(start + PAIRS_BLOCK, len(drawings))))
        seed = data_seed * 1_000_000_007 + 10_000 + number
        shown, colours = scenes(block, SHARE_COMMON, torch.Generator().manual_seed(seed))
        images.append(shown)
        writer = Writer(seed)
        captions += [writer.caption(c, names[k]) for c, k in zip(block.concept.tolist(), colours.tolist())]
    return TensorImages(torch.cat(images)[:total], caption=captions[:total])


def _no_concept(images: Tensor) -> Drawings:
    return Drawings(images, torch.full((len(images),), -1), ("",) * len(images))


def _with(base: TensorImages, images: Tensor) -> TensorImages:
    return TensorImages(images, **base.columns)
