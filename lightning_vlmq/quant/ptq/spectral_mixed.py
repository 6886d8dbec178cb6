"""Mixed precision: bits layer by layer, at the size of one width for all, where they keep the ranks of the output."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.allocation import allocate, total
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.methods import METHODS, PTQMethod, register, within
from lightning_vlmq.quant.scheme import LayerRule, QuantScheme
from lightning_vlmq.quant.sensitivity import (
    Costs,
    band_noise,
    first_pairs,
    free_layers,
    hessian_costs,
    noise_share,
    output_costs,
    require_widths,
)

log = logging.getLogger(__name__)

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a layer may get."""


@register("spectral_mixed")
@dataclass(frozen=True)
class SpectralMixed(PTQMethod):
    """Bits layer by layer under a size budget, by what rounding a layer alone does to chosen ranks of the output.

    The budget is the size of all weights at the scheme's ``weight_bits``; the choice is the best there is under it, see
    :func:`~lightning_vlmq.quant.allocation.allocate`, and no more than 0.5 % smaller. Layers that a rule, ``first_last`` or the lack of
    a measure (a caption decoder's) fixes keep their width. The widths become rules of the scheme, so that a
    checkpoint or conversion has them.

    Attributes:
        sensitivity: what is summed over layers. ``spectral``: noise over signal of the ranks ``first_rank`` to ``end_rank`` of the
            tower's features, ``sum_k N_k / lambda_k`` on full precision's basis; ``sqnr``: total noise over total signal there
            (as Pandey et al. 2023, arXiv 2302.05397, who choose greedily); ``hawq_v2``: mean Hessian trace of the contrastive loss times
            squared weight error (Dong et al. 2020, arXiv 1911.03852).
        first_rank: first of the ranks that count, from 0; of effect in ``spectral`` alone.
        end_rank: end of these (excluded); 0 for all.
        pairs: calibration pairs that it is measured on.
        probes: random vectors of each trace's estimate; of effect in ``hawq_v2`` alone.
        rounding: method that then rounds the weights; sensitivities are of round-to-nearest on grids of ``mse`` where that is
            chosen, else of min-max.
    """

    sensitivity: Literal["spectral", "sqnr", "hawq_v2"] = "spectral"
    first_rank: int = within(0, 0)
    end_rank: int = within(64, 0)
    pairs: int = within(128, 1)
    probes: int = within(8, 1)
    rounding: Literal["minmax", "mse", "gptq"] = "minmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.end_rank <= self.first_rank:
            raise VLMQError(f"ranks {self.first_rank} to {self.end_rank} are none; end_rank 0 means all that follow")

    def plan(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> QuantScheme:
        """The scheme with a rule for every layer whose width was free; a scheme that leaves none free comes back as it is."""
        require_widths(scheme)
        free = free_layers(vlm, scheme)
        if not free:
            return scheme
        costs = self.costs(vlm, scheme, calibration)
        numbers = np.array([module.weight.numel() for module in free.values()])  # type: ignore[operator, union-attr]
        sizes = numbers[:, None] * np.array(WIDTHS)
        budget = int(numbers.sum()) * scheme.weight_bits
        table = np.array([[costs[name][width] for width in WIDTHS] for name in free])
        chosen = allocate(table, sizes, budget)
        widths = {name: WIDTHS[choice] for name, choice in zip(free, chosen)}
        shared = ", ".join(f"{n} of {bits} bits" for bits, n in sorted(Counter(widths.values()).items()))
        log.info("%s: %s; %.4f of the budget", self, shared, total(sizes, chosen) / budget)
        rules = [LayerRule(name, weight_bits=bits) for name, bits in widths.items()]
        return replace(scheme, overrides=[*scheme.overrides, *rules])

    def costs(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> Costs:
        """What each free layer costs at each of :data:`WIDTHS`."""
        batches = first_pairs(calibration, self.pairs)
        fit = METHODS["mse" if self.rounding == "mse" else "minmax"].fit_weight
        if self.sensitivity == "hawq_v2":
            return hessian_costs(vlm, scheme, batches, WIDTHS, fit, self.probes)
        in_band = partial(band_noise, start=self.first_rank, stop=self.end_rank or None)
        reduce = in_band if self.sensitivity == "spectral" else noise_share
        return output_costs(vlm, scheme, batches, WIDTHS, fit, reduce)

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`, with the widths of :meth:`plan`."""
        return METHODS[self.rounding].prepare(vlm, self.plan(vlm, scheme, calibration), calibration)
