"""The embedded benchmark: about a thousand concepts drawn by a dozen houses, in every role."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.data.corruptions import CORRUPTIONS
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.embedded.concepts import FOLDER, require_apart
from lightning_vlmq.data.embedded.kept import kept_sets
from lightning_vlmq.data.embedded.sets import DATASETS, Recipe, build_sets, read_pairs
from lightning_vlmq.data.embedded.wording import TEMPLATES
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.renditions import RENDITIONS


class EmbeddedData(ReliabilityDataModule):
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
        n_concepts: how many concepts of each part, trained and never trained, are classes, spread evenly over the names; ``None`` takes
            all. The caption pairs stay those of all concepts.
        n_id: images in the id set, spread evenly over all of them; ``None`` takes all.
        n_shifted: images in each corruption, shift and spurious set (``unseen`` excepted).
        n_ood: images in each OOD set, and in ``unseen``.
        corruptions: names from :data:`~lightning_vlmq.data.corruptions.CORRUPTIONS`.
        severities: 1..5.
        renditions: names from :data:`~lightning_vlmq.data.renditions.RENDITIONS`.
        data_seed: seed of backgrounds, places, captions and corruptions.
        on_bad_image: ``"error"`` or ``"skip"``, see :func:`~lightning_vlmq.data.images.encoded.decode_images`.
        batch_size: images per batch when evaluating.
        train_batch_size: image-caption pairs per batch when training or calibrating.
        num_workers: loader processes; images are in memory, so 0 is fastest.
        decoded: folder to make the evaluation sets into, once for all processes, which map them into their memory; ``None`` makes them in
            each. Moves no number.
        calibration_pairs: number of caption pairs to calibrate and train on, from the first; ``None`` takes all (1,000).
    """

    def __init__(
        self,
        path: str | None = None,
        datasets: Sequence[str] = tuple(DATASETS),
        n_concepts: int | None = None,
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
        decoded: str | None = None,
    ) -> None:
        super().__init__(batch_size, train_batch_size, num_workers)
        self.save_hyperparameters()
        for kind, names, known in (
            ("data set", datasets, DATASETS),
            ("corruption", corruptions, CORRUPTIONS),
            ("rendition", renditions, RENDITIONS),
        ):
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)
        for what, number in (
            ("n_concepts", n_concepts),
            ("n_id", n_id),
            ("n_shifted", n_shifted),
            ("n_ood", n_ood),
            ("calibration_pairs", calibration_pairs),
        ):
            if number is not None and number < 1:
                raise VLMQError(f"{what} must be at least 1, got {number}")
        self.calibration_pairs = calibration_pairs
        self.datasets, self.decoded = tuple(datasets), decoded
        self.recipe = Recipe(
            path=str(FOLDER / "drawings.parquet" if path is None else path),
            n_concepts=n_concepts,
            n_id=n_id,
            n_shifted=n_shifted,
            n_ood=n_ood,
            corruptions=tuple(corruptions),
            severities=tuple(severities),
            renditions=tuple(renditions),
            data_seed=data_seed,
            on_bad_image=on_bad_image,
        )
        self.class_names = list(self.recipe.class_names())
        self.templates = TEMPLATES

    def setup(self, stage: str | None = None) -> None:
        """Build the evaluation sets and the caption pairs; a second call in one process takes the sets from memory."""
        self.eval_sets = [
            s
            for name in self.datasets
            for s in (
                build_sets(name, self.recipe) if self.decoded is None else kept_sets(name, self.recipe, self.decoded)
            )
        ]
        n = self.calibration_pairs
        self.pairs = read_pairs(self.recipe.path, self.recipe.data_seed, self.recipe.on_bad_image, n)
        if n is not None and n > len(self.pairs):
            raise VLMQError(
                f"'{self.recipe.path}' holds {len(self.pairs)} image-caption pairs, {n} are asked for; lower calibration_pairs"
            )
        require_apart(self.recipe.path)
        self.require_disjoint_pairs()
