"""The package from Python, on images of one's own: load a model, quantize it, evaluate it, get a table.

Example:
    >>> import torch, lightning_vlmq as vlmq
    >>> images, labels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 3
    >>> calibration = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    >>> vlm = vlmq.load_vlm("vit_clean")
    >>> quantized = vlmq.quantize(vlm, "minmax", calibration, ["a photo of a shirt"] * 8, weight_bits=4, scope="vision_text")
    >>> table = vlmq.evaluate(quantized, images, labels, class_names=["shirt", "bag", "boot"])
    >>> bool(table.query("metric == 'agreement' and dataset == 'own'")["value"].item() <= 1)
    True
    >>> f"{quantized.coverage.weight_share():.0%} of the weights"
    '100% of the weights'
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Trainer
from PIL import Image
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.core.preprocessing import Framing
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.images.pixels import Preprocess
from lightning_vlmq.data.sets import EvalSet, TensorImages
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.quant import METHODS, CoverageReport, Quantized
from lightning_vlmq.quant import quantize as quantize_in_place

__all__ = ["Images", "QuantizedVLM", "evaluate", "load_vlm", "quantize"]

Images = Tensor | np.ndarray | Sequence[Image.Image | str | Path]
"""Images: uint8 ``[n, 3, height, width]`` (tensor) or ``[n, height, width, 3]`` (NumPy), or pictures or files of any size, which
are brought to the model's input as it was trained to see them; what such files may hold is read as docs/data.md says."""


@dataclass(frozen=True, eq=False)
class QuantizedVLM:
    """A quantized model, and the full-precision one that it is compared with.

    Attributes:
        vlm: the quantized model.
        reference: the model before.
        quantization: method and scheme.
        quantized: what came of it.
    """

    vlm: VLM
    reference: VLM
    quantization: Quantization
    quantized: Quantized

    @property
    def coverage(self) -> CoverageReport:
        """What of it is quantized."""
        return self.quantized.coverage


def quantize(
    vlm: VLM, method: str, images: Images, captions: Sequence[str], batch_size: int = 125, **scheme: Any
) -> QuantizedVLM:
    """Quantize a copy of a model after training, calibrated on captioned images.

    Args:
        vlm: the full-precision model; stays as it is.
        method: a post-training method, as ``vlmq list methods`` names it.
        images: ``n`` images, none of which should be evaluated on.
        captions: their ``n`` captions.
        batch_size: images per batch.
        scheme: fields of :class:`~lightning_vlmq.modules.Quantization`, e.g. ``weight_bits=4, scope="vision_text"``.

    Raises:
        VLMQError: unknown method or scheme, a method that needs training, images and captions that do not go together.
    """
    quantization = Quantization(method=method, **scheme)
    if quantization.method in METHODS and quantization.chosen().needs_training:
        raise VLMQError(f"{method} is trained; quantize by it with vlmq fit --config qat --config quant/{method}")
    wanted = quantization.scheme()
    if wanted is None:
        raise VLMQError(f"'{method}' quantizes nothing; vlmq list methods names those that do")
    tensor = _pixels(images, vlm.preprocessing.framing)
    if len(tensor) != len(captions) or not len(captions):
        raise VLMQError(
            f"calibration needs one caption per image, got {len(tensor)} images and {len(captions)} captions"
        )
    own = copy.deepcopy(vlm)
    tokens = own.tokenize(list(captions))
    batches = [
        {"image": image, "tokens": token} for image, token in zip(tensor.split(batch_size), tokens.split(batch_size))
    ]
    quantized = quantize_in_place(own, quantization.chosen(), wanted, batches, quantization.minimum_coverage)
    return QuantizedVLM(own, vlm, quantization, quantized)


def evaluate(
    model: VLM | QuantizedVLM,
    images: Images,
    labels: Sequence[int] | Tensor | np.ndarray,
    class_names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    near_ood: Images | None = None,
    far_ood: Images | None = None,
    scores: Sequence[str] = ("mcm", "msp", "maxlogit", "energy", "entropy"),
    batch_size: int = 128,
) -> pd.DataFrame:
    """Judge a model zero-shot on labelled images, and on images of no class where there are some.

    Args:
        model: a model, or a quantized one, which is then compared with full precision on the same images.
        images: ``n`` images.
        labels: ``n`` class indices, into ``class_names``.
        class_names: one name per class.
        templates: prompts with one ``{}`` for the class name.
        near_ood: images of things like the classes that are none of them.
        far_ood: images of something else altogether.
        scores: OOD scores, as ``vlmq list scores`` names them.
        batch_size: images per batch.

    Returns:
        One row per data set, metric and score: ``dataset``, ``role``, ``metric``, ``score``, ``value``, ``stderr``, ``n`` and more. Values
        are fractions; docs/metrics.md defines each.

    Raises:
        VLMQError: labels out of range, images and labels that do not go together, unknown scores.
    """
    bare = model.reference if isinstance(model, QuantizedVLM) else model
    data = _OwnData(
        bare.preprocessing.framing,
        images,
        labels,
        class_names,
        templates,
        {"near_ood": near_ood, "far_ood": far_ood},
        batch_size,
    )
    module = EvaluationModule(bare, scores=scores)
    if isinstance(model, QuantizedVLM):
        module.take(model.vlm, model.reference, model.quantization, model.quantized)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the images are in memory
        quiet = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        level = quiet.level
        quiet.setLevel(logging.WARNING)  # Lightning's lines about devices
        try:
            trainer = Trainer(
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                devices=1,
            )
            trainer.validate(module, data, verbose=False)
        finally:
            quiet.setLevel(level)
    return pd.DataFrame([asdict(row) for row in module.rows])


class _OwnData(ReliabilityDataModule):
    """Images in memory as evaluation sets."""

    def __init__(
        self,
        framing: Framing,
        images: Images,
        labels: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        ood: dict[str, Images | None],
        batch_size: int,
    ) -> None:
        super().__init__(batch_size, batch_size, 0)
        target = torch.as_tensor(np.asarray(labels)).long()
        tensor = _pixels(images, framing)
        if target.shape != (len(tensor),) or not len(target):
            raise VLMQError(
                f"every image needs one label, got {len(tensor)} images and labels of shape {tuple(target.shape)}"
            )
        if int(target.min()) < 0 or int(target.max()) >= len(class_names):
            raise VLMQError(
                f"labels must be 0 to {len(class_names) - 1}, indices into class_names; got {target.unique().tolist()[:9]}"
            )
        self.class_names, self.templates = tuple(class_names), tuple(templates)
        self.eval_sets = [EvalSet("own", "id", TensorImages(tensor, target=target))]
        for role, outside in ood.items():
            if outside is not None:
                none = _pixels(outside, framing)
                self.eval_sets.append(EvalSet(role, role, TensorImages(none, target=torch.full((len(none),), -1))))


def _pixels(images: Images, framing: Framing) -> Tensor:
    """Images as uint8 ``[n, 3, height, width]``."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).movedim(-1, 1) if images.ndim == 4 else torch.from_numpy(images)
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise VLMQError(
                f"images must be uint8 [n, 3, height, width] (NumPy: [n, height, width, 3]), got {images.dtype} {tuple(images.shape)}"
            )
        return images
    decoded, preprocess = [], Preprocess.of(framing)
    for number, image in enumerate(images):
        try:
            with Image.open(image) if isinstance(image, str | Path) else nullcontext(image) as picture:
                decoded.append(preprocess(picture))
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            name = f"'{image}'" if isinstance(image, str | Path) else f"a {type(image).__name__}"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise VLMQError(
                f"image {number} ({name}) cannot be read: {reason}; give pictures or files that Pillow reads"
            ) from error
    if not decoded:
        raise VLMQError("there are no images; give at least one")
    return torch.stack(decoded)
