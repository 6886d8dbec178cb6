"""The embedded benchmark: about a thousand concepts drawn by a dozen houses, in every role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import skimage.data
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.registry import Registry
from lightning_vlmq.data.corruptions import CORRUPTIONS, corrupt
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.embedded.concepts import FOLDER, Drawings, class_names, group_of, read_drawings
from lightning_vlmq.data.embedded.scenes import COLOURS, SIZE, backgrounds, compose, draw_colours, place, textures
from lightning_vlmq.data.embedded.wording import TEMPLATES, Writer
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.renditions import RENDITIONS, rendition
from lightning_vlmq.data.sets import EvalSet, TensorImages

SHARE_COMMON = 0.9  # of the images on their group's colour, in training and in distribution
HOUSES = {"openmoji": "openmoji", "line": "emojione-monotone", "silhouette": "fluent-emoji-high-contrast"}
_TEXTURES = ("brick", "grass", "gravel")


@dataclass(frozen=True)
class ConceptRecipe:
    """What the evaluation sets are made of; see :class:`ConceptData` for the fields."""

    path: str
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

    def drawings(self, part: str, limit: int | None = None) -> Drawings:
        """A part of the file, or ``limit`` of its drawings spread evenly over it."""
        drawings = read_drawings(self.path, part, self.on_bad_image)
        if limit is None or limit >= len(drawings):
            return drawings
        return drawings.select(torch.arange(limit) * len(drawings) // limit)


CONCEPT_SETS: Registry[Callable[[ConceptRecipe], list[EvalSet]]] = Registry("data set")


@lru_cache(maxsize=64)
def build_concept_sets(name: str, recipe: ConceptRecipe) -> list[EvalSet]:
    """The evaluation sets of one group of :data:`CONCEPT_SETS`, built once a process. Raises for an unknown group."""
    return CONCEPT_SETS[name](recipe)


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


def _labelled(drawings: Drawings, generator: torch.Generator, share_common: float = SHARE_COMMON) -> TensorImages:
    return TensorImages(scenes(drawings, share_common, generator)[0], target=drawings.concept)


def _outside(images: Tensor) -> TensorImages:
    return TensorImages(images, target=torch.full((len(images),), -1))


@CONCEPT_SETS.register("concepts")
def _concepts(recipe: ConceptRecipe) -> list[EvalSet]:
    return [EvalSet("concepts", "id", _labelled(recipe.drawings("id", recipe.n_id), recipe.generator(1)))]


@CONCEPT_SETS.register("unseen")
def _unseen(recipe: ConceptRecipe) -> list[EvalSet]:
    """Concepts never trained, twice: among the trained classes they are near-OOD, among themselves a zero-shot test."""
    drawings = recipe.drawings("unseen", recipe.n_ood)
    images = scenes(drawings, 0.0, recipe.generator(2))[0]
    names = class_names(trained=False)
    own = TensorImages(images, target=drawings.concept - len(class_names()))
    return [
        EvalSet("novel", "near_ood", _outside(images), group="unseen"),
        EvalSet("unseen", "shift", own, class_names=names, group="unseen"),
    ]


@CONCEPT_SETS.register("digits")
def _digits(recipe: ConceptRecipe) -> list[EvalSet]:
    """Handwritten digits of scikit-learn as white ink on the benchmark's backgrounds."""
    ink = torch.from_numpy(load_digits().images[: recipe.n_ood]).float()[:, None] * (255 / 16)
    alpha = F.interpolate(ink, size=(48, 48), mode="bilinear").round().to(torch.uint8)
    drawings = torch.cat([torch.full_like(alpha, 255).expand(-1, 3, -1, -1), alpha], 1)
    return [EvalSet("digits", "far_ood", _outside(scenes(_no_concept(drawings), 0.0, recipe.generator(3))[0]))]


@CONCEPT_SETS.register("textures")
def _photographs(recipe: ConceptRecipe) -> list[EvalSet]:
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


@CONCEPT_SETS.register("pictograms")
def _pictograms(recipe: ConceptRecipe) -> list[EvalSet]:
    """Pictograms of a game's interface, none of whose names shares a word with a concept."""
    drawings = recipe.drawings("pictogram", recipe.n_ood)
    return [EvalSet("pictograms", "far_ood", _outside(scenes(drawings, 0.0, recipe.generator(5))[0]))]


@CONCEPT_SETS.register("corruptions")
def _corruptions(recipe: ConceptRecipe) -> list[EvalSet]:
    """The same images uncorrupted (severity 0), then by family and severity."""
    base = _labelled(recipe.drawings("id", recipe.n_shifted), recipe.generator(6))
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


@CONCEPT_SETS.register("houses")
def _houses(recipe: ConceptRecipe) -> list[EvalSet]:
    """Three houses never trained on: one in colour, one of lines, one of silhouettes."""
    drawings = recipe.drawings("house")
    sets = []
    for stream, (name, house) in enumerate(HOUSES.items(), start=20):
        part = drawings.of_house(house)
        n = min(recipe.n_shifted, len(part))
        part = part.select(torch.arange(n) * len(part) // n)
        sets.append(EvalSet(name, "shift", _labelled(part, recipe.generator(stream)), name))
    return sets


@CONCEPT_SETS.register("renditions")
def _renditions(recipe: ConceptRecipe) -> list[EvalSet]:
    base = _labelled(recipe.drawings("id", recipe.n_shifted), recipe.generator(7))
    return [
        EvalSet(name, "shift", _with(base, rendition(base.images, name)), name, group="renditions")
        for name in recipe.renditions
    ]


@CONCEPT_SETS.register("backgrounds")
def _backgrounds(recipe: ConceptRecipe) -> list[EvalSet]:
    """The same drawings, places and textures, on their group's colour and on another group's."""
    drawings = recipe.drawings("id", recipe.n_shifted)
    return [
        EvalSet(f"backgrounds_{name}", "spurious", _labelled(drawings, recipe.generator(8), share), group="backgrounds")
        for name, share in (("common", 1.0), ("counter", 0.0))
    ]


def read_caption_pairs(recipe: ConceptRecipe) -> TensorImages:
    """The calibration pairs: training drawings on scenes of their own, with a clean caption each."""
    drawings = recipe.drawings("pairs")
    images, colours = scenes(drawings, SHARE_COMMON, recipe.generator(9))
    writer, names = Writer(recipe.data_seed), list(COLOURS)
    captions = [writer.caption(c, names[k]) for c, k in zip(drawings.concept.tolist(), colours.tolist())]
    return TensorImages(images, caption=captions)


class ConceptData(ReliabilityDataModule):
    """About a thousand concepts of Unicode's emoji, as drawn by a dozen houses, on coloured and textured backgrounds, in every role.

    ``id``: two drawings of every trained concept, of houses that are trained on, but never with this concept. ``near_ood``: 160
    concepts never trained, which are a zero-shot test too (``unseen``, a shift with class names of its own). ``far_ood``:
    scikit-learn's digits, scikit-image's texture photographs, pictograms of a game's interface. ``corruption``: ImageNet-C
    families, and the same images uncorrupted. ``shift``: houses never trained on (``openmoji`` in colour, ``line`` and
    ``silhouette`` without), and renditions. ``spurious``: the same drawings on their group's background colour and on another's.
    Caption pairs are training drawings.

    Args:
        path: the file of drawings; ``None`` takes the packaged one.
        datasets: the groups of evaluation sets to build, in order.
        n_id: images in the id set, spread evenly over all of them; ``None`` takes all.
        n_shifted: images in each corruption, shift and spurious set (``unseen`` excepted).
        n_ood: images in each OOD set, and in ``unseen``.
        corruptions: names from :data:`~lightning_vlmq.data.corruptions.CORRUPTIONS`.
        severities: 1..5.
        renditions: names from :data:`~lightning_vlmq.data.renditions.RENDITIONS`.
        data_seed: seed of backgrounds, places, captions and corruptions.
        on_bad_image: ``"error"`` or ``"skip"``, see :func:`~lightning_vlmq.data.images.encoded.decode_images`.
        batch_size: images a batch when evaluating.
        train_batch_size: image-caption pairs a batch when training or calibrating.
        num_workers: loader processes; images are in memory, so 0 is fastest.
        calibration_pairs: number of caption pairs to calibrate and train on, from the first; ``None`` takes all (1,000).
    """

    def __init__(
        self,
        path: str | None = None,
        datasets: Sequence[str] = tuple(CONCEPT_SETS),
        n_id: int | None = None,
        n_shifted: int = 482,
        n_ood: int = 400,
        corruptions: Sequence[str] = ("gaussian_noise", "defocus_blur", "contrast"),
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        renditions: Sequence[str] = tuple(RENDITIONS),
        data_seed: int = 0,
        on_bad_image: OnBadImage = "error",
        batch_size: int = 400,
        train_batch_size: int = 125,
        num_workers: int = 0,
        calibration_pairs: int | None = None,
    ) -> None:
        super().__init__(batch_size, train_batch_size, num_workers)
        self.save_hyperparameters()
        for kind, names, known in (
            ("data set", datasets, CONCEPT_SETS),
            ("corruption", corruptions, CORRUPTIONS),
            ("rendition", renditions, RENDITIONS),
        ):
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)
        for what, number in (
            ("n_id", n_id),
            ("n_shifted", n_shifted),
            ("n_ood", n_ood),
            ("calibration_pairs", calibration_pairs),
        ):
            if number is not None and number < 1:
                raise VLMQError(f"{what} must be at least 1, got {number}")
        self.calibration_pairs = calibration_pairs
        self.datasets = tuple(datasets)
        self.recipe = ConceptRecipe(
            path=str(FOLDER / "drawings.parquet" if path is None else path),
            n_id=n_id,
            n_shifted=n_shifted,
            n_ood=n_ood,
            corruptions=tuple(corruptions),
            severities=tuple(severities),
            renditions=tuple(renditions),
            data_seed=data_seed,
            on_bad_image=on_bad_image,
        )
        self.class_names = list(class_names())
        self.templates = TEMPLATES

    def setup(self, stage: str | None = None) -> None:
        """Build the evaluation sets and the caption pairs; a second call in one process takes the sets from memory."""
        self.eval_sets = [s for name in self.datasets for s in build_concept_sets(name, self.recipe)]
        pairs = read_caption_pairs(self.recipe)
        n = self.calibration_pairs
        if n is not None:
            if n > len(pairs):
                raise VLMQError(
                    f"'{self.recipe.path}' holds {len(pairs)} image-caption pairs, {n} are asked for; lower calibration_pairs"
                )
            pairs = TensorImages(pairs.images[:n], caption=pairs.columns["caption"][:n])
        self.pairs = pairs
        self.require_disjoint_pairs()


def _no_concept(images: Tensor) -> Drawings:
    return Drawings(images, torch.full((len(images),), -1), ("",) * len(images))


def _with(base: TensorImages, images: Tensor) -> TensorImages:
    return TensorImages(images, **base.columns)
