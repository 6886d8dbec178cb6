"""How much it costs to round one layer's weight to some width, all else in full precision: three measures of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.blocks import run_tower
from lightning_vlmq.quant.calibrating import Batch, RangeObserver, calibrate
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers, swap_layers
from lightning_vlmq.quant.rules import layer_schemes
from lightning_vlmq.quant.scheme import UNQUANTIZED_BITS, QuantScheme
from lightning_vlmq.spectral import RankTable, SecondMoments, eigenbasis, rank_table
from lightning_vlmq.statistics.resamples import seeded_generator

log = logging.getLogger(__name__)

Costs = dict[str, dict[int, float]]
"""By layer name and width."""
LOSS_PAIRS = 32
"""Pairs in a loss whose second derivatives are taken, for the memory and time that they cost."""


def free_layers(vlm: VLM, scheme: QuantScheme) -> dict[str, nn.Module]:
    """The layers whose width no rule fixes, by name: all in scope but those of rules, edges and a caption decoder.

    The decoder's layers reach no embedding, so nothing here can tell what rounding them costs.
    """
    widths = [
        {name: own.weight_bits for name, own in layer_schemes(vlm, replace(scheme, weight_bits=b)).values() if own}
        for b in (2, 3)
    ]
    modules = dict(vlm.named_modules())
    free = [name for name, bits in widths[0].items() if bits == 2 and widths[1][name] == 3]
    return {name: modules[name] for name in free if not vlm.in_decoder(name)}


def first_pairs(batches: Sequence[Batch], pairs: int) -> list[Batch]:
    """The first so many pairs of the batches, in these; an empty batch is left out."""
    kept: list[Batch] = []
    for batch in batches:
        own = {key: value[:pairs] for key, value in batch.items()}
        pairs -= len(own["image"])
        kept += [own] if len(own["image"]) else []
    if not kept:
        raise VLMQError("the calibration data hold no batch with an image; give at least one image")
    return kept


class WeightsAlone:
    """A copy of a model in which one layer's weight at a time is rounded to some width.

    Args:
        vlm: full precision.
        scheme: granularities, symmetry, scope and rules.
        width: bits of the weights.
        fit: fixes one layer's weight grid.
    """

    def __init__(self, vlm: VLM, scheme: QuantScheme, width: int, fit: Callable[[QuantizedLayer], None]) -> None:
        self.vlm = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize}).eval()
        swap_layers(self.vlm, replace(scheme, weight_bits=width))
        self.layers = quantized_layers(self.vlm)
        with torch.no_grad():
            for layer in self.layers.values():
                if layer.weight_fake_quant.quantizes:
                    fit(layer)
        for module in self.vlm.modules():
            if isinstance(module, FakeQuantizer):
                module.enabled = False

    @torch.no_grad()
    def error(self, name: str) -> Tensor:
        """Rounded weight less full precision's, in its shape."""
        layer = self.layers[name]
        layer.weight_fake_quant.enabled = True
        try:
            return layer.weight_fake_quant(layer.weight) - layer.weight
        finally:
            layer.weight_fake_quant.enabled = False

    @torch.no_grad()
    def features(self, name: str, tower: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tower's features of each batch with this layer's weight rounded and nothing else."""
        quantizer = self.layers[name].weight_fake_quant
        quantizer.enabled = True
        try:
            return [run_tower(self.vlm, tower, batch) for batch in inputs]
        finally:
            quantizer.enabled = False


def output_costs(
    vlm: VLM,
    scheme: QuantScheme,
    batches: Sequence[Batch],
    widths: Sequence[int],
    fit: Callable[[QuantizedLayer], None],
    reduce: Callable[[RankTable], float],
) -> Costs:
    """What each layer alone at each width does to its tower's features, rank by rank, reduced to a number.

    Moments are plain (not around the mean), so that a shift of all features counts too.

    Args:
        vlm: full precision; not changed.
        scheme: see :class:`WeightsAlone`.
        batches: pairs.
        widths: bits.
        fit: fixes one layer's weight grid.
        reduce: of the table of ranks on full precision's basis; see :func:`band_noise` and :func:`noise_share`.

    Raises:
        VLMQError: what :func:`require_sound` refuses.
    """
    free = {tower: [n for n in free_layers(vlm, scheme) if vlm.tower_of(n) == tower] for tower in scheme.towers}
    require_sound(vlm, scheme, batches)
    columns = {"vision": "image", "text": "tokens"}
    inputs = {tower: [batch[columns[tower]] for batch in batches] for tower in scheme.towers}
    reference = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize}).eval()
    with torch.no_grad():
        full = {tower: [run_tower(reference, tower, x) for x in inputs[tower]] for tower in scheme.towers}
    bases = {tower: _basis(features) for tower, features in full.items()}
    found: Costs = {name: {} for names in free.values() for name in names}
    for width in widths:
        alone = WeightsAlone(vlm, scheme, width, fit)
        for tower, names in free.items():
            for name in names:
                moments = SecondMoments(full[tower][0].shape[1], full[tower][0].device)
                for z, q in zip(full[tower], alone.features(name, tower, inputs[tower])):
                    moments.update(z, q)
                found[name][width] = reduce(rank_table(moments, centred=False, basis=bases[tower]))
    return found


def require_sound(vlm: VLM, scheme: QuantScheme, batches: Sequence[Batch]) -> None:
    """Run over the batches once; :class:`VLMQError` names a layer without inputs, or with such as are not finite, or a missing column."""
    alone = WeightsAlone(vlm, scheme, 8, lambda layer: None)
    calibrate(alone.vlm, scheme, batches, {name: RangeObserver() for name in alone.layers})


def _basis(features: Sequence[Tensor]) -> Tensor:
    z = torch.cat(list(features)).double()
    return eigenbasis(z.mT @ z)[1]


def band_noise(table: RankTable, start: int, stop: int | None) -> float:
    """Sum over the ranks ``start`` to ``stop`` of noise over signal, ``N_k / lambda_k``; ranks without signal do not count.

    Raises:
        VLMQError: no rank there has signal.
    """
    part = slice(start, stop)
    if not len(table.energy[part]):
        raise VLMQError(
            f"the outputs on the calibration data have {len(table)} ranks, none from {start} on; give more pairs or lower ranks"
        )
    return float((table.noise[part] / table.energy[part]).sum())


def noise_share(table: RankTable) -> float:
    """Total noise over total signal, the inverse of the SQNR of all ranks together."""
    return table.total_noise / table.total_energy


def hessian_costs(
    vlm: VLM,
    scheme: QuantScheme,
    batches: Sequence[Batch],
    widths: Sequence[int],
    fit: Callable[[QuantizedLayer], None],
    probes: int,
    seed: int = 0,
) -> Costs:
    """HAWQ-V2's: mean Hessian trace times squared weight error (Dong et al. 2020, arXiv 1911.03852, Eq. 10).

    The loss is the one that such a model is trained with, of the calibration pairs; see :func:`pair_loss`. A mean trace below zero,
    as one away from a minimum can be, counts as zero.

    Args:
        vlm: full precision; not changed.
        scheme: see :class:`WeightsAlone`.
        batches: pairs, images and tokens; the loss is that of :data:`LOSS_PAIRS` at a time.
        widths: bits.
        fit: fixes one layer's weight grid.
        probes: random vectors of a trace's estimate.
        seed: of these.

    Raises:
        VLMQError: batches without tokens, and what :func:`require_sound` refuses.
    """
    require_sound(vlm, scheme, batches)
    if any("tokens" not in batch for batch in batches):
        raise VLMQError("hawq_v2 takes the loss of pairs: give calibration batches with tokens, whatever the scope")
    own = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize}).eval().requires_grad_(False)
    weights = {name: module.weight for name, module in free_layers(own, scheme).items()}
    for weight in weights.values():
        weight.requires_grad_(True)  # type: ignore[operator]
    parts = [
        {key: value[start : start + LOSS_PAIRS] for key, value in batch.items()}
        for batch in batches
        for start in range(0, len(batch["image"]), LOSS_PAIRS)
    ]
    losses = [partial(pair_loss, own, part) for part in parts]
    # attention's fused kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        traces = hessian_traces(losses, weights, probes, seed)  # type: ignore[arg-type]
    if bent := [name for name, trace in traces.items() if trace < 0]:
        log.warning(
            "hawq_v2: the Hessian's mean trace is below zero in %d of %d layers (%s, ...), as the loss is at no minimum there; it counts "
            "as zero, so that these layers get the fewest bits",
            *(len(bent), len(traces), bent[0]),
        )
    found: Costs = {name: {} for name in weights}
    for width in widths:
        alone = WeightsAlone(vlm, scheme, width, fit)
        for name, trace in traces.items():
            error = alone.error(name)
            found[name][width] = max(trace / error.numel(), 0.0) * float(error.double().square().sum())
    return found


def hessian_traces(
    losses: Sequence[Callable[[], Tensor]], weights: Mapping[str, Tensor], probes: int, seed: int = 0
) -> dict[str, float]:
    """Trace of each weight's own block of the Hessian of the mean loss, by Hutchinson's estimator ``E[v^T H v]``, v random signs.

    Signs are drawn for one weight at a time: drawn for all at once they would cost less, but what the other blocks add, though zero
    in the mean, drowns a small trace. Exact where a block is diagonal.

    Args:
        losses: one per batch; each computes its loss anew, differentiable twice in the weights.
        weights: leaves that require gradients, by name.
        probes: random vectors of each weight, dealt out over the batches; at least one in each.
        seed: of these.
    """
    generator = seeded_generator(seed, 0)
    found = dict.fromkeys(weights, 0.0)
    share = -(-probes // len(losses))
    for loss in losses:
        slopes = torch.autograd.grad(loss(), list(weights.values()), create_graph=True, allow_unused=True)
        for (name, leaf), slope in zip(weights.items(), slopes):
            if slope is None or not slope.requires_grad:
                continue  # takes no part, or a linear one
            for _ in range(share):
                signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
                (product,) = torch.autograd.grad(slope, leaf, signs, retain_graph=True, allow_unused=True)
                if product is not None:
                    found[name] += float((signs.double() * product.double()).sum()) / (share * len(losses))
    return found


def pair_loss(vlm: VLM, batch: Batch) -> Tensor:
    """The contrastive loss of a batch of pairs: CLIP's (Radford et al. 2021, Figure 3), of sigmoid models SigLIP's (Zhai et al. 2023)."""
    image, text = (run_tower(vlm, tower, batch[c]) for tower, c in (("vision", "image"), ("text", "tokens")))
    logits = vlm.logit_scale().detach() * image @ text.T + vlm.logit_bias().detach()
    pairs = torch.arange(len(logits), device=logits.device)
    if vlm.is_sigmoid:
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def require_widths(scheme: QuantScheme) -> None:
    """Raise :class:`VLMQError` for a scheme whose weights are not quantized: there is nothing to give widths to."""
    if scheme.weight_bits == UNQUANTIZED_BITS:
        raise VLMQError("weight_bits 16 leaves no size to share out; give the width whose size is the budget")
