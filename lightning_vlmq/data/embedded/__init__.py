"""The embedded data modules and their committed Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.embedded.captions import COLOURS, TEMPLATES, write_captions
from lightning_vlmq.data.embedded.compose import (
    CLASS_NAMES,
    TRAINED,
    compose,
    draw_colours,
    load_fashion_mnist,
    trained_mask,
)
from lightning_vlmq.data.embedded.sets import DATASETS, FOLDER, Recipe, build_sets, read_pairs
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.sets import TensorImages

N_PAIRS = 1000
ALL_DATASETS = ("garments", "held_out", "digits", "textures", "corruptions", "renditions", "backgrounds")


class EmbeddedData(ReliabilityDataModule):
    """Fashion-MNIST garments on coloured backgrounds, in every role.

    ``id``: trained classes, common backgrounds. ``near_ood``: the two held-out classes. ``far_ood``: scikit-learn's digits and
    scikit-image's texture photographs. ``corruption``: ImageNet-C families. ``shift``: renditions. ``spurious``: the same garments
    on common and on counter backgrounds. Caption pairs come from Fashion-MNIST's training part, evaluation images from its test part.

    Args:
        path: folder that holds ``garments.parquet`` and ``pairs.parquet``; ``None`` takes the packaged files.
        datasets: the groups of evaluation sets to build, in order.
        per_class: images a class in the id set (the packaged file has 200); the spurious sets take half as many.
        per_class_shifted: images a class in each corruption and shift set.
        n_far_ood: images in each far-OOD set.
        corruptions: names from :data:`~lightning_vlmq.data.corruptions.CORRUPTIONS`.
        severities: 1..5.
        renditions: names from :data:`~lightning_vlmq.data.renditions.RENDITIONS`.
        data_seed: seed of backgrounds and corruptions.
        on_bad_image: ``"error"`` or ``"skip"``, see :func:`~lightning_vlmq.data.images.encoded.decode_images`.
        batch_size: images a batch when evaluating.
        train_batch_size: image-caption pairs a batch when training or calibrating.
        num_workers: loader processes; images are in memory, so 0 is fastest.
        calibration_pairs: number of caption pairs to calibrate and train on, from the first; ``None`` takes all (1,000).
    """

    def __init__(
        self,
        path: str | None = None,
        datasets: Sequence[str] = ALL_DATASETS,
        per_class: int = 200,
        per_class_shifted: int = 40,
        n_far_ood: int = 400,
        corruptions: Sequence[str] = ("gaussian_noise", "defocus_blur", "contrast"),
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        renditions: Sequence[str] = ("inverted", "outline", "rotated", "posterised"),
        data_seed: int = 0,
        on_bad_image: OnBadImage = "error",
        batch_size: int = 400,
        train_batch_size: int = 125,
        num_workers: int = 0,
        calibration_pairs: int | None = None,
    ) -> None:
        super().__init__(batch_size, train_batch_size, num_workers)
        self.save_hyperparameters()
        for name in datasets:
            if name not in DATASETS:
                raise unknown("data set", name, DATASETS)
        if per_class < 1 or per_class_shifted < 1 or n_far_ood < 1:
            raise VLMQError(
                "per_class, per_class_shifted and n_far_ood must be at least 1; leave a group out of datasets instead"
            )
        if calibration_pairs is not None and calibration_pairs < 1:
            raise VLMQError(f"calibration_pairs must be at least 1, got {calibration_pairs}; leave it out for all")
        self.calibration_pairs = calibration_pairs
        self.datasets = tuple(datasets)
        self.recipe = Recipe(
            path=str(FOLDER if path is None else path),
            per_class=per_class,
            per_class_shifted=per_class_shifted,
            n_far_ood=n_far_ood,
            corruptions=tuple(corruptions),
            severities=tuple(severities),
            renditions=tuple(renditions),
            data_seed=data_seed,
            on_bad_image=on_bad_image,
        )
        self.class_names = list(TRAINED)
        self.templates = TEMPLATES

    def setup(self, stage: str | None = None) -> None:
        """Build the evaluation sets and read the caption pairs; a second call in one process takes them from memory."""
        self.eval_sets = [s for name in self.datasets for s in build_sets(name, self.recipe)]
        pairs = read_pairs(self.recipe.path, self.recipe.on_bad_image)
        if self.calibration_pairs is not None:
            n = self.calibration_pairs
            if n > len(pairs):
                where = Path(self.recipe.path) / "pairs.parquet"
                raise VLMQError(
                    f"'{where}' holds {len(pairs)} image-caption pairs, {n} are asked for; lower calibration_pairs"
                )
            pairs = TensorImages(pairs.images[:n], caption=pairs.columns["caption"][:n])
        self.pairs = pairs
        self.require_disjoint_pairs()


class EmbeddedPretraining(EmbeddedData):
    """Fashion-MNIST's whole training part with captions, for pre-training the zoo; validation runs on id and spurious sets.

    The images behind the committed calibration pairs are left out.

    Args:
        root: folder that holds (or will hold) torchvision's ``FashionMNIST`` folder.
        captions: ``"clean"``, or ``"noisy"``: a share of the captions belongs to another image.
        noise_rate: that share.
        share_common: share of images on the background colour of their class.
        train_batch_size: image-caption pairs a batch.
        data_seed: seed of backgrounds, placement and captions.
    """

    def __init__(
        self,
        root: str = "data",
        captions: Literal["clean", "noisy"] = "clean",
        noise_rate: float = 0.35,
        share_common: float = 0.9,
        train_batch_size: int = 256,
        data_seed: int = 0,
    ) -> None:
        super().__init__(datasets=("garments", "backgrounds"), data_seed=data_seed, train_batch_size=train_batch_size)
        self.save_hyperparameters()
        if not 0 <= noise_rate < 1 or not 0 <= share_common <= 1:
            raise VLMQError("noise_rate must lie in [0, 1) and share_common in [0, 1]")
        self.root = root
        self.noise_rate = noise_rate if captions == "noisy" else 0.0
        self.share_common = share_common

    def setup(self, stage: str | None = None) -> None:
        """Read and compose the training images (about 150 MB) and write their captions."""
        super().setup(stage)
        generator = self.recipe.generator(100)
        garments = load_fashion_mnist(self.root, train=True)
        garments = garments.select(trained_mask(garments.labels))
        rows = torch.ones(len(garments.labels), dtype=torch.bool)
        rows[calibration_rows(len(rows))] = False
        garments = garments.select(rows)
        colours = draw_colours(garments.labels, self.share_common, generator)
        images = compose(garments.images, colours, generator, jitter=2)
        names = [CLASS_NAMES[i] for i in garments.labels]
        captions = write_captions(names, [list(COLOURS)[i] for i in colours], garments.brightness(), generator)
        wrong = (torch.rand(len(captions), generator=generator) < self.noise_rate).nonzero().flatten()
        swapped = wrong.roll(1)  # a derangement of the chosen rows: each gets the caption of another image
        originals = {int(to): captions[int(source)] for to, source in zip(wrong, swapped)}
        self.pairs = TensorImages(images, caption=[originals.get(i, caption) for i, caption in enumerate(captions)])


def calibration_rows(n: int) -> Tensor:
    """Rows of the training part (trained classes only) that become the calibration pairs: the last thousand, int64 ``[1000]``."""
    return torch.arange(n - N_PAIRS, n)
