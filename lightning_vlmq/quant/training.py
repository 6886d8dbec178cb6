"""What the methods with training share: the distillation loss, and which parameters learn at which rate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers
from lightning_vlmq.quant.methods import PTQMethod, within
from lightning_vlmq.quant.rounding import STEP_FLOOR, choose_qparams, to_blocks
from lightning_vlmq.quant.scheme import QuantScheme

RATES = {2: (3e-2, 1e-3), 4: (1e-2, 1e-3), 8: (1e-3, 1e-3)}
"""Peak rates of weights and of steps by the most weight bits that they are for; see :func:`default_rates`."""


LEVELS = 8
"""Of a 4-bit grid, on either side of zero: those that rates of weights' steps are for."""


def default_rates(weight_bits: int) -> tuple[float, float]:
    """Peak learning rates of weights (in steps an update) and of steps (relative, an update), by bits of the weights.

    Those of 3 and 4 bits were chosen by ``scripts/search_rates.py`` on the clean embedded models, by pairs that no fit sees; those of
    8 and 2 bits on one of them, of 2 bits before training started from the best of several fits.
    """
    return RATES[next((bits for bits in RATES if weight_bits <= bits), 8)]


@dataclass(frozen=True)
class QATMethod(PTQMethod):
    """Quantization-aware training: a start (:meth:`prepare`), a distillation loss and the parameters to train.

    The teacher is the full-precision model; where text is out of scope, the student's text features are the teacher's.

    Attributes:
        distillation: ``contrastive``, or ``feature`` for that and the feature loss of CLIP-KD.
        contrast: what an image is told from, and a text: ``pairs``, the teacher's texts (images) of all pairs that are trained on, or
            ``batch``, those of its own batch, as in CLIP-KD. A batch here is small; with all pairs a fit generalises better.
        feature_weight: weight of the feature loss, a mean over features of unit-norm vectors (Yang et al. 2024: 2000, the
            authors' scripts); of no effect in ``contrastive``.
    """

    needs_training: ClassVar[bool] = True

    distillation: Literal["contrastive", "feature"] = "contrastive"
    contrast: Literal["pairs", "batch"] = "pairs"
    feature_weight: float = within(2000.0, 0)

    @abstractmethod
    def init_training(self, vlm: VLM) -> None:
        """Mark what a model whose grids are fitted is to learn."""

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`, which is the starting point; then release what learns and freeze what does not.

        That is all outside the scope's towers, and a text decoder (CoCa's): no loss here runs it, so its quantized
        layers, their steps and offsets stay where the method starts.
        """
        super().prepare(vlm, scheme, calibration)
        self.init_training(vlm)
        for name, parameter in vlm.named_parameters():
            if vlm.tower_of(name) not in scheme.towers or vlm.in_decoder(name):
                parameter.requires_grad_(False)
        return vlm

    def loss_parts(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        logit_scale: Tensor | float,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The parts whose sum is trained on: ``contrastive`` and, with feature distillation, ``feature``.

        Args:
            student_image: unit-norm features ``[B, D]`` of the quantized image encoder.
            student_text: unit-norm text features ``[B, D]``; the teacher's where text is out of scope.
            teacher_image: the full-precision model's, ``[B, D]``.
            teacher_text: the full-precision model's, ``[B, D]``.
            logit_scale: the teacher's factor on cosine similarities.
            pairs: the teacher's image and text features, ``[P, D]`` each, for ``contrast="pairs"``; without them the batch is all there is.

        Returns:
            Scalars, means over the batch, already weighted.
        """
        others = pairs if self.contrast == "pairs" else None
        parts = {
            "contrastive": contrastive_distillation(
                student_image, student_text, teacher_image, teacher_text, logit_scale, others
            )
        }
        if self.distillation == "feature":
            features = F.mse_loss(student_image, teacher_image) + F.mse_loss(student_text, teacher_text)
            parts["feature"] = self.feature_weight * features
        return parts

    def loss(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        logit_scale: Tensor | float,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The sum of :meth:`loss_parts`, scalar."""
        parts = self.loss_parts(student_image, student_text, teacher_image, teacher_text, logit_scale, pairs)
        return torch.stack(list(parts.values())).sum()

    def parameter_groups(
        self, vlm: VLM, weight_lr: float, weight_decay: float = 0.0, step_lr: float = 0.01
    ) -> list[dict[str, Any]]:
        """Optimizer parameter groups of a prepared model, at rates relative to each tensor's own quantization step.

        Adam moves a parameter by about its learning rate per update whatever the gradient's size (so that LSQ's gradient
        scale is divided out again). How much a move matters is told by the quantization step: a weight that goes half a
        step changes level. So every quantized weight, and every tensor of steps or offsets, is a group of its own:

        - weights: ``weight_lr`` times the median step of that weight;
        - all else that learns (biases, norms, embeddings, tables, weights left at 16 bits): ``weight_lr`` times the median
          of those medians;
        - steps of inputs: ``step_lr`` times their median, about the relative change per update;
        - steps of weights: that times ``2^(4 - bits)``. A weight keeps its level while its step learns, so that a change of the step by
          a share moves a weight by as many steps as that share of its level: the outermost one moves as far, in steps, as that
          of a 4-bit grid, whatever the bits;
        - offsets: ``step_lr`` times the median range, so that both move a grid's ends alike.

        So a small tensor of steps moves as fast, relative to its size, as a large one, and no median over the model starves it; within
        a tensor (the channels of one weight) steps below the median move faster and those above it slower. LSQ's gradient scale
        is of no effect here, as Adam divides by the gradient's own size.

        Where no weight is quantized, steps are those of an 8-bit grid. Call :meth:`keep_steps_positive` after every update.

        Args:
            vlm: a model that :meth:`prepare` returned.
            weight_lr: learning rate of weights, in quantization steps per update.
            weight_decay: decoupled, of all with two or more axes.
            step_lr: learning rate of steps of inputs, and of 4-bit weights, relative to their size.

        Returns:
            Groups with a ``name``, one of ``weights``, ``matrices``, ``vectors``, ``weight_steps``, ``activation_steps``,
            ``weight_offsets`` and ``activation_offsets``; several have the same.
        """
        groups: list[dict[str, Any]] = []
        taken: set[int] = set()

        def add(name: str, parameters: list[nn.Parameter], lr: float, decay: float = 0.0) -> None:
            learned = [p for p in parameters if p.requires_grad and id(p) not in taken]
            taken.update(map(id, learned))
            if learned:
                groups.append({"name": name, "params": learned, "lr": lr, "weight_decay": decay})

        layers = quantized_layers(vlm).values()
        medians = []
        for layer in layers:
            step = _median_weight_step(layer)
            if layer.weight.requires_grad:
                medians.append(step)
            if layer.weight_fake_quant.quantizes:
                add("weights", [layer.weight], weight_lr * step, weight_decay)  # type: ignore[list-item]
        for kind, quantizer in learned_quantizers(vlm):
            step = quantizer.scale.detach().median().item()
            levels = (quantizer.qmax - quantizer.qmin + 1) / 2
            rate = step_lr * LEVELS / levels if kind == "weight" else step_lr
            add(f"{kind}_steps", [quantizer.scale], rate * step)
            if quantizer.offset is not None:
                add(f"{kind}_offsets", [quantizer.offset], step_lr * step * (quantizer.qmax - quantizer.qmin))
        typical = torch.tensor(medians).median().item() if medians else 0.0
        rest = list(vlm.parameters())
        add("matrices", [p for p in rest if p.ndim > 1], weight_lr * typical, weight_decay)
        add("vectors", [p for p in rest if p.ndim < 2], weight_lr * typical)
        return groups

    def keep_steps_positive(self, vlm: VLM) -> None:
        """Raise the learned steps that an update took below :data:`STEP_FLOOR` to it.

        Using a step clamps it, so a negative one would only mean zeros; but its gradient would go on pushing it down,
        and the layer would stay dead until as many updates had brought it back.
        """
        with torch.no_grad():
            for _, quantizer in learned_quantizers(vlm):
                quantizer.scale.clamp_(min=STEP_FLOOR)


def learned_quantizers(vlm: VLM) -> list[tuple[str, FakeQuantizer]]:
    """The quantizers whose step learns, each with its side, ``weight`` or ``activation``, in the model's order."""
    sides = [
        (side, quantizer)
        for layer in quantized_layers(vlm).values()
        for side, quantizer in (("weight", layer.weight_fake_quant), ("activation", layer.act_fake_quant))
    ]
    return [(side, quantizer) for side, quantizer in sides if quantizer.scale.requires_grad]


def _median_weight_step(layer: QuantizedLayer) -> float:
    """The median step of a layer's weight grid; of an 8-bit one per output channel where the weight is not quantized."""
    quantizer, weight = layer.weight_fake_quant, layer.weight.detach()
    if quantizer.quantizes:
        return float(quantizer.grid(to_blocks(weight, quantizer.granularity))[0].detach().median())
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    return float(choose_qparams(low, high, -128, 127, symmetric=True)[0].median())


def contrastive_distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
    others: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Match image-text similarities: CLIP-KD's contrastive relational distillation.

    ``KL(softmax(t I_t T_t^T) || softmax(t I_s T_s^T))`` over rows (image to text) and over columns (text to image),
    averaged over the batch and over the two directions (Yang et al. 2024, arXiv 2307.12732), as in the authors' code. A
    bias on the logits (SigLIP) cancels in the softmax.

    With ``others`` the candidates are these, the teacher's, in place of the student's own of the batch:
    ``KL(softmax(t I_t T^T) || softmax(t I_s T^T))`` and likewise texts with images, as in CLIP-KD's interactive contrast. The
    direction of a tower that is the teacher's own is then zero.

    Args:
        student_image: unit-norm features ``[B, D]``.
        student_text: unit-norm features ``[B, D]``.
        teacher_image: unit-norm features ``[B, D]``; no gradient flows to them.
        teacher_text: unit-norm features ``[B, D]``; likewise.
        logit_scale: the factor ``t`` on cosine similarities.
        others: unit-norm image and text features of the teacher, ``[P, D]`` each; no gradient flows to them.

    Returns:
        Scalar, at least 0, and 0 where student and teacher agree (or the batch holds one pair and there are no others).
    """
    scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
    if others is None:
        student = scale * student_image @ student_text.T
        teacher = (scale * teacher_image @ teacher_text.T).detach()
        sides = ((student, teacher), (student.T, teacher.T))
    else:
        images, texts = (part.detach() for part in others)
        sides = (
            (scale * student_image @ texts.T, (scale * teacher_image @ texts.T).detach()),
            (scale * student_text @ images.T, (scale * teacher_text @ images.T).detach()),
        )

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1), reduction="batchmean", log_target=True)

    return (divergence(*sides[0]) + divergence(*sides[1])) / 2
