"""What a quantization method is: post-training (:class:`PTQMethod`) or with training (:class:`QATMethod`), by name.

A method overrides the steps it is about and inherits round-to-nearest with min-max ranges for the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.registry import Registry
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, RangeObserver, calibrate
from lightning_vlmq.quant.coverage import CoverageReport, assert_covered, measure_coverage
from lightning_vlmq.quant.fake_quant import STEP_FLOOR, FakeQuantizer, all_finite, block_range, to_blocks
from lightning_vlmq.quant.layers import (
    QuantizedLayer,
    quantized_layers,
    static_layers,
    swap_layers,
    weight_quantized_layers,
)
from lightning_vlmq.quant.scheme import FULL_PRECISION, QuantScheme

METHODS: Registry[type[PTQMethod]] = Registry("method")


class PTQMethod:
    """Post-training quantization: transform the model, swap layers, fit transforms, activation ranges, weights.

    Attributes:
        needs_training: whether it is only the start of a training.
        is_control: whether it only stands in for a quantization, to be compared with it.
        has_integers: whether all that it leaves of a weight is integers on a grid, as checkpoints and conversion need it.
    """

    needs_training = False
    is_control = False
    has_integers = True

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """Quantize a model in place (copy it first if the full-precision one is still needed).

        Args:
            vlm: the full-precision model.
            scheme: bits, granularities and scope.
            calibration: batches, run through as often as the method needs;
                ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``.

        Returns:
            The same model.

        Raises:
            VLMQError: what :func:`swap_layers` and :func:`calibrate` refuse.
        """
        self.transform_model(vlm, scheme)
        swap_layers(vlm, scheme)
        with torch.no_grad():
            self.fit_transforms(vlm, scheme, calibration)
            if static_layers(vlm):
                self.fit_activations(vlm, scheme, calibration)
            self.fit_weights(vlm, scheme, calibration)
        return vlm

    def transform_model(self, vlm: VLM, scheme: QuantScheme) -> None:
        """Change the full-precision model into an equivalent one that is easier to quantize; nothing by default."""

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Move difficulty between a layer's input and weight before ranges are taken; nothing by default."""

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the static activation grids, of which there is at least one; the extreme values by default."""
        layers = static_layers(vlm)
        observers = {name: RangeObserver() for name in layers}
        calibrate(vlm, scheme, calibration, observers)
        for name, observer in observers.items():
            layers[name].act_fake_quant.set_range(observer.minimum, observer.maximum)

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the weight grids (and the weights, where a method rounds them itself); layer by layer by default."""
        for layer in weight_quantized_layers(vlm).values():
            self.fit_weight(layer)

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's weight grid; the smallest and largest value of each block by default."""
        quantizer = layer.weight_fake_quant
        quantizer.set_range(*block_range(to_blocks(layer.weight, quantizer.granularity), quantizer.granularity))


class QATMethod(PTQMethod, ABC):
    """Quantization-aware training: a start (:meth:`prepare`), a distillation loss and the parameters to train.

    The teacher is the full-precision model; where text is out of scope, the student's text features are the teacher's.

    Attributes:
        feature_weight: weight of the feature loss; 0 leaves contrastive distillation alone.
    """

    needs_training = True
    feature_weight = 0.0

    @abstractmethod
    def init_training(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Set the quantizers' starting point, from a model with min-max grids, and mark what they learn."""

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`, then set the starting point and freeze what is not trained.

        That is all outside the scope's towers, and a text decoder (CoCa's): no loss here runs it, so its quantized
        layers, their steps and offsets stay where the method starts.
        """
        super().prepare(vlm, scheme, calibration)
        self.init_training(vlm, scheme, calibration)
        for name, parameter in vlm.named_parameters():
            if vlm.tower_of(name) not in scheme.towers or vlm.in_decoder(name):
                parameter.requires_grad_(False)
        return vlm

    def loss(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        logit_scale: Tensor | float,
    ) -> Tensor:
        """Contrastive distillation, plus ``feature_weight`` times the feature mean squared error.

        Args:
            student_image: unit-norm features ``[B, D]`` of the quantized image encoder.
            student_text: unit-norm text features ``[B, D]``; the teacher's where text is out of scope.
            teacher_image: the full-precision model's, ``[B, D]``.
            teacher_text: the full-precision model's, ``[B, D]``.
            logit_scale: the teacher's factor on cosine similarities.

        Returns:
            Scalar loss, mean over the batch.
        """
        loss = contrastive_distillation(student_image, student_text, teacher_image, teacher_text, logit_scale)
        if self.feature_weight:
            features = F.mse_loss(student_image, teacher_image) + F.mse_loss(student_text, teacher_text)
            loss = loss + self.feature_weight * features
        return loss

    def parameter_groups(
        self, vlm: VLM, lr: float, weight_decay: float = 0.0, step_lr: float = 0.01
    ) -> list[dict[str, Any]]:
        """Optimizer parameter groups of a prepared model.

        Weights and embeddings (two or more axes) decay, biases and norms do not, and neither do steps and offsets. Adam
        moves a parameter by about ``lr`` per update whatever the gradient's size, and a step can be a thousand times
        smaller than a weight's range; so weight steps and activation steps are groups of their own (one for each
        bit-width, which decides a step's size), whose learning rate is ``step_lr`` times their median: about the
        relative change per update. Offsets move by that share of the median range. Call :meth:`keep_steps_positive`
        after every update.

        Args:
            vlm: a model that :meth:`prepare` returned.
            lr: learning rate of weights.
            weight_decay: of weights.
            step_lr: learning rate of steps, relative to their size.

        Returns:
            Groups with a ``name``: ``matrices``, ``vectors``, and for each bit-width in use, say 4 and 8,
            ``weight4_steps``, ``weight4_offsets``, ``activation8_steps``, ``activation8_offsets``; those without
            parameters are left out.
        """
        alike: defaultdict[str, list[FakeQuantizer]] = defaultdict(list)
        for layer in quantized_layers(vlm).values():
            for kind, quantizer in (("weight", layer.weight_fake_quant), ("activation", layer.act_fake_quant)):
                if quantizer.scale.requires_grad:
                    alike[f"{kind}{quantizer.bits}"].append(quantizer)
        groups: list[dict[str, Any]] = []
        for name, learned in sorted(alike.items()):
            step = torch.cat([q.scale.detach() for q in learned]).median().item()
            span = step * (learned[0].qmax - learned[0].qmin)
            offsets = [q.offset for q in learned if q.offset is not None and q.offset.requires_grad]
            groups.append({"name": f"{name}_steps", "params": [q.scale for q in learned], "lr": step_lr * step})
            groups.append({"name": f"{name}_offsets", "params": offsets, "lr": step_lr * span})
        own = {id(parameter) for group in groups for parameter in group["params"]}
        rest = [p for p in vlm.parameters() if p.requires_grad and id(p) not in own]
        matrices, vectors = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim < 2]
        groups.insert(0, {"name": "vectors", "params": vectors, "lr": lr})
        groups.insert(0, {"name": "matrices", "params": matrices, "lr": lr})
        decay = {"matrices": weight_decay}
        return [{**group, "weight_decay": decay.get(group["name"], 0.0)} for group in groups if group["params"]]

    def keep_steps_positive(self, vlm: VLM) -> None:
        """Raise the learned steps that an update took below :data:`STEP_FLOOR` to it.

        Using a step clamps it, so a negative one would only mean zeros; but its gradient would go on pushing it down,
        and the layer would stay dead until as many updates had brought it back.
        """
        with torch.no_grad():
            for layer in quantized_layers(vlm).values():
                for quantizer in (layer.weight_fake_quant, layer.act_fake_quant):
                    if quantizer.scale.requires_grad:
                        quantizer.scale.clamp_(min=STEP_FLOOR)


def contrastive_distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
) -> Tensor:
    """Match in-batch image-text similarities: CLIP-KD's contrastive relational distillation.

    ``KL(softmax(t I_t T_t^T) || softmax(t I_s T_s^T))`` over rows (image to text) and over columns (text to image),
    averaged over the batch and over the two directions (Yang et al. 2024, arXiv 2307.12732), as in the authors' code. A
    bias on the logits (SigLIP) cancels in the softmax.

    Args:
        student_image: unit-norm features ``[B, D]``.
        student_text: unit-norm features ``[B, D]``.
        teacher_image: unit-norm features ``[B, D]``; no gradient flows to them.
        teacher_text: unit-norm features ``[B, D]``; likewise.
        logit_scale: the factor ``t`` on cosine similarities.

    Returns:
        Scalar, at least 0, and 0 where student and teacher agree (or the batch holds one pair).
    """
    scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
    student = scale * student_image @ student_text.T
    teacher = (scale * teacher_image @ teacher_text.T).detach()

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1), reduction="batchmean", log_target=True)

    return (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2


def quantize(
    vlm: VLM, method: str, scheme: QuantScheme, calibration: Iterable[Batch], minimum_coverage: float = 0.95
) -> CoverageReport:
    """Quantize a model in place, or set it up for quantization-aware training, and prove that it is covered.

    Args:
        vlm: full-precision model; changed in place.
        method: a name in :data:`METHODS`, e.g. ``"minmax"`` or ``"lsq_contrastive"``.
        scheme: bits, granularities and scope.
        calibration: batches ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``. A data loader or list is
            iterated as often as the method needs; a one-shot iterator is read into memory first.
        minimum_coverage: smallest share of the scope's matrix weights that has to be quantized.

    Returns:
        What is quantized.

    Raises:
        VLMQError: unknown method, weights or calibration data that are not finite, too little covered, or a scheme the
            method does not take.
    """
    chosen = METHODS[method]()
    repeatable = list(calibration) if isinstance(calibration, Iterator) else calibration
    chosen.prepare(vlm, scheme, cast("list[Batch]", repeatable))
    require_finite_layers(vlm)
    report = measure_coverage(vlm)
    assert_covered(report, scheme.scope, minimum_coverage)
    return report


def require_finite_layers(vlm: VLM) -> None:
    """Raise :class:`VLMQError` naming the first quantized layer whose weight or static grid is not finite."""
    with torch.no_grad():
        for name, layer in quantized_layers(vlm).items():
            act = layer.act_fake_quant
            static = act.enabled and not act.dynamic
            if not all_finite(layer.effective_weight()) or (static and not all_finite(act.scale)):
                raise VLMQError(
                    f"layer '{name}' is not finite after quantization; check the weights and the calibration data"
                )


@dataclass(frozen=True)
class Quantization(QuantScheme):
    """How to quantize: a method, and a point of the grid (the scheme's fields).

    Attributes:
        method: a name of the methods' table, or ``fp32`` for the model as it is, whatever the scheme says.
        minimum_coverage: smallest share of the scope's matrix weights that has to be quantized.

    Raises:
        VLMQError: for an unknown method, or a value outside what :class:`~lightning_vlmq.quant.QuantScheme` takes.
    """

    method: str = FULL_PRECISION
    minimum_coverage: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != FULL_PRECISION and self.method not in METHODS:
            raise unknown("method", self.method, [FULL_PRECISION, *METHODS])

    def scheme(self) -> QuantScheme | None:
        """The scheme alone, or ``None`` for full precision."""
        if self.method == FULL_PRECISION:
            return None
        return QuantScheme(**{f.name: getattr(self, f.name) for f in fields(QuantScheme)})
