"""The data module of data sets on disk: an id set, any others beside it, and caption pairs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.images.encoded import OnBadImage
from lightning_vlmq.data.images.files import FileImages, decode_all
from lightning_vlmq.data.images.mapped import decoded_files, decoded_path, file_bytes, map_decoded
from lightning_vlmq.data.images.pixels import Decoder, Orientation, Preprocess
from lightning_vlmq.data.readers.base import Reader, Reading, shorten
from lightning_vlmq.data.readers.names import (
    TEMPLATES,
    are_numbers,
    name_classes,
    resolve_class_names,
    resolve_templates,
)
from lightning_vlmq.data.readers.pairs import PairReader
from lightning_vlmq.data.sets import EvalSet

log = logging.getLogger(__name__)


class FileData(ReliabilityDataModule):
    """Data sets on disk, in their published layouts or one's own, with their roles.

    The id set names the classes. Another set that has the same class names shares the zero-shot classifier; one whose names are
    among them predicts only those; one with names and prompts of its own gets a classifier of its own. Images are decoded batch
    by batch by the loader's processes, the caption pairs once, in ``setup``.

    Args:
        sets: readers of evaluation sets, see :mod:`lightning_vlmq.data.readers`; ``sets+`` in a config file adds to those of the
            configs before it.
        root: folder below which the readers' paths lie.
        pairs: reader of caption pairs, needed to calibrate or train.
        class_names: what the id set's classes are called, instead of what its reader says: names in label order, ``imagenet``,
            ``cifar10``, a text file with one name per line, or names by class. How they were matched is said.
        templates: prompts with ``{}`` for the class name, instead of the id set's; or a name of
            :data:`~lightning_vlmq.data.readers.names.TEMPLATES`.
        image_size: height and width that images are decoded to, in pixels; ``None`` takes the model's, as resize mode and
            interpolation always are (224, shortest side, where no model runs). CIFAR's stay smaller.
        calibration_pairs: number of caption pairs.
        pairs_seed: ``None`` takes the first pairs, a seed draws them.
        max_images: at most this many images of each set, drawn with ``data_seed``; ``None`` takes all.
        data_seed: seed of that draw.
        on_bad_image: at an image that cannot be read ``"error"`` stops, ``"skip"`` leaves it out and says so.
        orientation: ``"exif"`` turns images as their EXIF entry says, ``"stored"`` takes them as stored, as open_clip does.
        decoder: ``"pillow"`` gives open_clip's pixels, ``"torchvision"`` reads JPEGs more than twice as fast, within two grey levels of
            them.
        batch_size: images per batch when evaluating.
        train_batch_size: image-caption pairs per batch when training or calibrating.
        num_workers: loader processes.
        decoded: folder to decode evaluation images into, once for all runs that want them in the same size and manner; processes share
            its pages. ``None`` decodes them in every run.
        decoded_gb: at most this many GB there, for whatever models; sets that go beyond, in order, are decoded in every run, and it is
            said.
    """

    def __init__(
        self,
        sets: Sequence[Reader] = (),
        root: str = "data",
        pairs: PairReader | None = None,
        class_names: str | list[str] | dict[str, str] | None = None,
        templates: str | list[str] | None = None,
        image_size: int | None = None,
        calibration_pairs: int = 1000,
        pairs_seed: int | None = None,
        max_images: int | None = None,
        data_seed: int = 0,
        on_bad_image: OnBadImage = "error",
        orientation: Orientation = "exif",
        decoder: Decoder = "pillow",
        batch_size: int = 128,
        train_batch_size: int = 125,
        num_workers: int = 4,
        decoded: str | None = None,
        decoded_gb: float = 100.0,
    ) -> None:
        super().__init__(batch_size, train_batch_size, num_workers)
        self.save_hyperparameters()
        for name, value in (
            ("image_size", image_size),
            ("calibration_pairs", calibration_pairs),
            ("max_images", max_images),
        ):
            if value is not None and value < 1:
                raise VLMQError(f"{name} must be at least 1, got {value}")
        if not decoded_gb >= 0:
            raise VLMQError(f"decoded_gb must be at least 0, got {decoded_gb}")
        self.readers = tuple(sets)
        self.pair_reader = pairs
        self.image_size, self.orientation, self.decoder = image_size, orientation, decoder
        preprocess = Preprocess(image_size or 224, orientation=orientation, decoder=decoder)
        self.reading = Reading(Path(root), preprocess, on_bad_image, max_images, data_seed)
        self.calibration_pairs, self.pairs_seed = calibration_pairs, pairs_seed
        self.given_names = class_names
        if class_names is not None and not isinstance(class_names, Mapping):
            resolve_class_names(class_names)  # what is wrong with them is said at once
        self.decoded, self.decoded_gb = decoded, decoded_gb
        self.given_templates = None if templates is None else resolve_templates(templates)

    def setup(self, stage: str | None = None) -> None:
        """List the sets, agree on the classes, decode the caption pairs, and see that none of them is evaluated too."""
        if not self.readers:
            raise VLMQError("data.sets is empty; add a config (vlmq list data names them), or readers of your own")
        self.follow(self.framing)
        self.take([s for reader in self.readers for s in reader.read(self.reading)])
        if self.decoded is not None:
            self._keep_decoded(Path(self.decoded).expanduser())
        if self.pair_reader is not None:
            self.pairs = decode_all(self.read_pairs(), self.num_workers, "calibration images")
            self.require_disjoint_pairs()

    def _keep_decoded(self, folder: Path) -> None:
        """Take evaluation images from where they are decoded once, as far as there is room; where the disk fails, from their files."""
        there = decoded_files(folder)
        left, rest, kept = 1e9 * self.decoded_gb - sum(there.values()), [], []
        for s in self.eval_sets:
            images = s.images
            if isinstance(images, FileImages) and (
                needed := 0 if decoded_path(images, folder).name in there else file_bytes(images)
            ) <= max(left, 0):
                left -= needed
                try:
                    images = map_decoded(images, folder, self.num_workers)
                except OSError as error:
                    log.warning("'%s' cannot be written (%s): images are decoded in every run", folder, error.strerror)
                    left = 0
            elif isinstance(images, FileImages):
                rest.append(s.name)
            kept.append(replace(s, images=images))
        if rest:
            log.warning(
                "decoded_gb %g holds %d of %d sets; %s are decoded in every run",
                *(self.decoded_gb, len(kept) - len(rest), len(kept), shorten(rest)),
            )
        self.eval_sets = kept

    def follow(self, framing: Framing | None) -> None:
        """Decode images as a model wants them framed; another ``image_size`` than its own is said. ``None`` changes nothing."""
        if framing is None:
            return
        if self.image_size not in (None, framing.size):
            log.warning(
                "images are decoded to %d pixels and resized to the model's %d; leave image_size out to decode once",
                *(self.image_size, framing.size),
            )
            framing = replace(framing, size=self.image_size, resize_to=None)  # type: ignore[arg-type]
        preprocess = replace(Preprocess.of(framing), orientation=self.orientation, decoder=self.decoder)
        self.reading = replace(self.reading, preprocess=preprocess)

    def read_pairs(self) -> FileImages:
        """The caption pairs, listed but not decoded. Raises :class:`VLMQError` as their reader does."""
        assert self.pair_reader is not None
        return self.pair_reader.read(self.reading, self.calibration_pairs, self.pairs_seed)

    def take(self, sets: Sequence[EvalSet]) -> None:
        """Make these the evaluation sets: agree on class names and prompts, and check names and labels.

        Raises:
            VLMQError: names are used twice, classes do not go together, or labels are out of range.
        """
        names = [s.name for s in sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise VLMQError(f"several data sets are called {shorten(twice)}; give each its own name")
        inside = next((s for s in sets if s.role == "id"), None)
        space = None if inside is None else inside.class_names
        given = self.given_names
        if given is not None and space is None:
            if isinstance(given, Mapping):
                raise VLMQError("class_names by class need an id set that names its classes; give them in label order")
            self.class_names = resolve_class_names(given)
        elif given is not None and space is not None and inside is not None:
            self.class_names = name_classes(space, given, f"the id set '{inside.name}'")
        else:
            self.class_names = space or ()
        if are_numbers(self.class_names):
            log.warning(
                "classes are called '%s' to '%s', which models are asked for as they stand; give class_names",
                *(self.class_names[0], self.class_names[-1]),
            )
        own_templates = TEMPLATES["photo"] if inside is None or inside.templates is None else inside.templates
        self.templates = self.given_templates or own_templates
        self.eval_sets = [_placed(s, space, self.class_names) for s in sets]
        for s in self.eval_sets:
            _check_labels(s, self.class_names)


def _placed(s: EvalSet, space: tuple[str, ...] | None, class_names: Sequence[str]) -> EvalSet:
    """The set with its classes seen from the id set's (``space``, called ``class_names``): shared, some of them, or its own."""
    if s.class_names is None or ROLES[s.role].is_ood:
        return s
    if s.class_names in (space, class_names):
        return replace(s, class_names=None, templates=None)
    if s.templates is not None:
        return s
    space = space or tuple(class_names)
    strangers = [name for name in s.class_names if space.count(name) != 1]
    if strangers:
        raise VLMQError(
            f"class names of data set '{s.name}' are not among the id set's: {shorten(strangers)}; "
            "rename them, or give the set templates of its own"
        )
    return replace(s, class_names=None, classes=tuple(space.index(name) for name in s.class_names))


def _check_labels(s: EvalSet, class_names: Sequence[str]) -> None:
    if ROLES[s.role].is_ood or not isinstance(s.images, FileImages):
        return
    n = len(s.classes or s.class_names or class_names)
    if n == 0:
        raise VLMQError(f"data set '{s.name}' does not name its classes; add an id set that does, or set class_names")
    target = s.images.columns["target"]
    assert isinstance(target, Tensor)
    bad = ((target < 0) | (target >= n)).nonzero().flatten()
    if len(bad):
        name = s.images.source.name(int(s.images.rows[bad[0]]))
        raise VLMQError(
            f"{len(bad)} labels of data set '{s.name}' are out of 0..{n - 1}, the first is {int(target[bad[0]])} of '{name}'; "
            "check the labels, or name all classes"
        )
