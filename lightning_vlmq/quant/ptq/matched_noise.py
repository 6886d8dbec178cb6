"""Control: noise in the place of quantization, as strong as quantization's error."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.blocks import block_sites
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.imitated import (
    Imitation,
    Pattern,
    SiteErrors,
    imitate,
    observe_errors,
    quantized_twin,
    require_matched,
)
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers, swap_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod, register, within
from lightning_vlmq.quant.observers import grouped_rows, second_moments
from lightning_vlmq.quant.ptq.gptq import GPTQ, feedback
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.spectral import as_matrix

ROUNDS = 16
"""Times that the blocks' noise is adjusted at most."""
SHARE = 0.7
"""Of its gap, in decibels, that a block makes good in a round: what other blocks do in the same round reaches it too."""
LARGEST_SHARE = 2.0
"""What that may grow to where the block's own noise is a small part of what comes out of it."""
LARGEST_STEP = 6.0
"""Decibels that a block's noise changes by at most in a round, so that what other blocks hand on does not make it run away."""

HANDED_ON = "the noise of the blocks before it alone is too strong there, whatever its own"
"""Why a control may be out of reach: no factor on a block's noise undoes what comes in."""


@register("matched_noise")
@dataclass(frozen=True)
class MatchedNoise(PTQMethod):
    """Noise on every weight and every layer's input, with the power of a given quantization's errors there.

    A weight's noise has the norm of its quantization error in every output channel, an input's the mean square of its
    rounding error over the calibration data. GPTQ's errors are large, but make up for one another at the layer's output: noise
    of their norm is up to 20 dB stronger there and spreads otherwise through what follows, so that no factor makes a match of it.
    So noise takes the place of GPTQ's rounding errors, and later columns make up for it as they do for those. As independent
    errors add up otherwise than those of rounding, the noise of each block is then scaled until the signal-to-noise ratio after
    every block and at the outputs is that of the quantized model;
    a control that does not come within the tolerance is refused. It is the control of arXiv 2509.21173's follow-up:
    if any noise of that size does what quantization does, the spectrum is not the cause.

    Attributes:
        pattern: the quantization whose errors are matched.
        distribution: ``gaussian``, ``uniform``, or ``sign_flip``: the errors themselves, with random signs.
        draw: ``fixed``: a weight's noise is drawn once, and the noise of the i-th image of a batch is the same in every batch;
            ``each_forward``: both are drawn anew each time. Either way an image's noise follows its place in the batch, so that the batch
            size and the number of processes are part of a run's identity.
        seed: of the noise.
        tolerance_db: largest allowed difference of SQNR after any block and at the outputs, on the calibration data.
    """

    pattern: Pattern = "minmax"
    distribution: Literal["gaussian", "uniform", "sign_flip"] = "gaussian"
    draw: Literal["fixed", "each_forward"] = "fixed"
    seed: int = within(0, 0)
    tolerance_db: float = within(0.5, 0)

    is_control = True
    has_integers = False
    sees_batches = True

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`: put the noise in place.

        Raises:
            VLMQError: what the pattern refuses, or the noise is no match.
        """
        reference = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})
        twin = quantized_twin(vlm, self.pattern, scheme, calibration)
        swap_layers(vlm, scheme)
        with torch.no_grad():
            feedbacks = _feedbacks(METHODS[self.pattern], vlm, scheme, calibration)
            layers, patterns = imitate(vlm, twin), quantized_layers(twin)
            weights = {name: layer.weight for name, layer in layers.items()}
            errors = observe_errors(twin, weights, scheme, calibration)
            for number, (name, layer) in enumerate(layers.items()):
                weight_noise, act_noise = layer.weight_fake_quant, layer.act_fake_quant
                assert isinstance(weight_noise, Imitation) and isinstance(act_noise, Imitation)
                error = (patterns[name].effective_weight() - layer.weight).detach()
                weight_noise.feedback = feedbacks.get(name)
                weight_noise.error = as_matrix(_rounding(layer, error, weight_noise.feedback))
                act_noise.power.fill_(errors[name].input_power)
                for side, noise in enumerate((weight_noise, act_noise)):
                    noise.distribution, noise.is_redrawn = self.distribution, self.draw == "each_forward"
                    noise.seed, noise.stream = self.seed, 2 * number + side
            vlm.eval()
            self.match(vlm, layers, SiteErrors(reference, scheme, calibration), twin.eval())
        return vlm

    def match(self, vlm: VLM, layers: Mapping[str, QuantizedLayer], errors: SiteErrors, twin: VLM) -> None:
        """Scale the noise of each block until the model's SQNR is the twin's everywhere, and leave the round that came nearest.

        A block goes half as far as before whenever it went too far, and twice as far where that hardly helped. What is left after
        half of the rounds comes from a block that cannot make it good, as too much is handed on to it: the others then give way until
        a tower's largest gaps to either side are alike. Raises where no round comes within the tolerance.
        """
        wanted, site_of = errors.of(twin), _sites(vlm, layers, errors.scheme)
        aims, close = wanted, self.tolerance_db / 3
        share, last = dict.fromkeys(wanted, SHARE), dict.fromkeys(wanted, 0.0)
        best: dict[str, float] = {}
        nearest, factors = float("inf"), dict[Imitation, Tensor]()
        for rounds_left in reversed(range(ROUNDS + 1)):
            found = errors.of(vlm)
            worst = max(map(abs, _gaps(wanted, found).values()))
            if worst < nearest or not best:
                best, nearest, factors = found, worst, {noise: noise.factor.clone() for noise in _noises(layers)}
            if worst <= close or not rounds_left:
                break
            if rounds_left <= ROUNDS // 2:
                middle = _middle_gaps(wanted, found)
                aims = {site: level - middle[site.split("/")[0]] / 2 for site, level in aims.items()}
            gaps = _gaps(aims, found)
            for site, gap in gaps.items():
                if gap * last[site] < 0:
                    share[site] /= 2
                elif abs(gap) > max(close / 2, abs(last[site]) / 2) and last[site]:
                    share[site] = min(2 * share[site], LARGEST_SHARE)
            last = gaps
            for name, layer in layers.items():
                site, before = site_of[name]
                step = share[site] * _own_gap(aims, found, site, before)
                for noise in _noises({name: layer}):
                    noise.set_factor(noise.factor * 10 ** (max(-LARGEST_STEP, min(LARGEST_STEP, step)) / 20))
        for noise, factor in factors.items():
            noise.set_factor(factor)
        why, gaps = "", _gaps(wanted, best)
        weakest = min(gaps, key=gaps.__getitem__)
        if gaps[weakest] < -self.tolerance_db:
            for noise in _noises({name: layer for name, layer in layers.items() if site_of[name][0] == weakest}):
                noise.set_factor(torch.zeros_like(noise.factor))
            why = HANDED_ON if _gaps(wanted, errors.of(vlm))[weakest] < -self.tolerance_db else ""
        require_matched(wanted, best, self.tolerance_db, why)


def _gaps(wanted: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """Decibels by which SQNR is above what it should be, by site; none where both are infinite."""
    return {site: 0.0 if found[site] == level else found[site] - level for site, level in wanted.items()}


def _middle_gaps(wanted: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """Halfway between the lowest and the highest of a tower's gaps, in decibels; by tower."""
    by_tower: dict[str, list[float]] = {}
    for site, gap in _gaps(wanted, found).items():
        by_tower.setdefault(site.split("/")[0], []).append(gap)
    return {tower: (min(own) + max(own)) / 2 for tower, own in by_tower.items()}


def _feedbacks(method: PTQMethod, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> dict[str, Tensor]:
    """What GPTQ lets later columns make up for, by layer; of another method, nothing."""
    if not isinstance(method, GPTQ):
        return {}
    moments = second_moments(vlm, scheme, calibration)
    return {name: feedback(moment, method.damping) for name, _, moment in moments}


def _rounding(layer: QuantizedLayer, error: Tensor, shares: Tensor | None) -> Tensor:
    """What rounding did to a weight, of its error: the error itself, unless later columns made up for it."""
    return error if shares is None else (grouped_rows(layer, error) @ shares).view_as(error)


def _noises(layers: Mapping[str, QuantizedLayer]) -> list[Imitation]:
    """What stands in the place of the layers' quantizers, of weights and of inputs."""
    found = [noise for layer in layers.values() for noise in (layer.weight_fake_quant, layer.act_fake_quant)]
    return [noise for noise in found if isinstance(noise, Imitation)]


def _sites(vlm: VLM, layers: Mapping[str, QuantizedLayer], scheme: QuantScheme) -> dict[str, tuple[str, str | None]]:
    """The site after each layer and the site before that, by the layers' order in the model."""
    found: dict[str, tuple[str, str | None]] = {}
    for tower in scheme.towers:
        sites = block_sites(vlm, tower)
        names, modules = [*sites, f"{tower}/output"], list(sites.values())
        at = 0
        for name in (n for n in layers if vlm.tower_of(n) == tower):
            inside = next((k for k, module in enumerate(modules) if name.startswith(f"{module}.")), None)
            if inside is not None:
                at = inside
            elif modules and at and not vlm.in_decoder(name):
                at = len(modules)  # past the blocks: the tower's end
            elif modules and any(n.startswith(f"{modules[-1]}.") for n in found):
                at = len(modules)
            found[name] = (names[at], names[at - 1] if at else None)
    return found


def _own_gap(wanted: Mapping[str, float], found: Mapping[str, float], site: str, before: str | None) -> float:
    """Decibels by which a block's own noise is too weak, its share taken as what the noise after it has beyond that before it.

    Noise-to-signal ratios of neighbouring sites are subtracted; where that leaves nothing, the site's own gap is taken.
    """
    own = [
        10 ** (-level[site] / 10) - (0.0 if before is None else 10 ** (-level[before] / 10))
        for level in (wanted, found)
    ]
    gap = found[site] - wanted[site]
    if min(own) > 0:
        ratio = torch.tensor(own[0] / own[1])
        gap = float(10 * ratio.log10())
    return gap
