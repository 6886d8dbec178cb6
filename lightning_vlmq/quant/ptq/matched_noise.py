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
from lightning_vlmq.quant.methods import PTQMethod, register
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.spectral import as_matrix

ROUNDS = 8
"""Times that the blocks' noise is adjusted at most."""
SHARE = 0.7
"""Of its gap, in decibels, that a block makes good in a round: what other blocks do in the same round reaches it too."""


@register("matched_noise")
@dataclass(frozen=True)
class MatchedNoise(PTQMethod):
    """Noise on every weight and every layer's input, with the power of a given quantization's errors there.

    A weight's noise has the norm of its quantization error in every output channel, an input's the mean square of its
    rounding error over the calibration data. As independent errors add up otherwise than those of rounding, the noise of each
    block is then scaled until the signal-to-noise ratio after every block and at the outputs is that of the quantized model;
    a control that does not come within the tolerance is refused. It is the control of arXiv 2509.21173's follow-up:
    if any noise of that size does what quantization does, the spectrum is not the cause.

    Attributes:
        pattern: the quantization whose errors are matched.
        distribution: ``gaussian``, ``uniform``, or ``sign_flip``: the errors themselves, with random signs.
        draw: ``fixed``: a weight's noise is drawn once, and the noise of the i-th image of a batch is the same in every batch;
            ``each_forward``: both are drawn anew each time.
        seed: of the noise.
        tolerance_db: largest allowed difference of SQNR after any block and at the outputs, on the calibration data.
    """

    pattern: Pattern = "minmax"
    distribution: Literal["gaussian", "uniform", "sign_flip"] = "gaussian"
    draw: Literal["fixed", "each_forward"] = "fixed"
    seed: int = 0
    tolerance_db: float = 0.5

    is_control = True
    has_integers = False

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """As :meth:`PTQMethod.prepare`: put the noise in place.

        Raises:
            VLMQError: what the pattern refuses, or the noise is no match.
        """
        reference = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})
        twin = quantized_twin(vlm, self.pattern, scheme, calibration)
        swap_layers(vlm, scheme)
        with torch.no_grad():
            layers, patterns = imitate(vlm, twin), quantized_layers(twin)
            weights = {name: layer.weight for name, layer in layers.items()}
            errors = observe_errors(twin, weights, scheme, calibration)
            for number, (name, layer) in enumerate(layers.items()):
                weight_noise, act_noise = layer.weight_fake_quant, layer.act_fake_quant
                assert isinstance(weight_noise, Imitation) and isinstance(act_noise, Imitation)
                weight_noise.error = as_matrix(patterns[name].effective_weight()).sub(as_matrix(layer.weight)).detach()
                act_noise.power.fill_(errors[name].input_power)
                for side, noise in enumerate((weight_noise, act_noise)):
                    noise.distribution, noise.is_redrawn = self.distribution, self.draw == "each_forward"
                    noise.seed, noise.stream = self.seed, 2 * number + side
            vlm.eval()
            self.match(vlm, layers, SiteErrors(reference, scheme, calibration), twin.eval())
        return vlm

    def match(self, vlm: VLM, layers: Mapping[str, QuantizedLayer], errors: SiteErrors, twin: VLM) -> None:
        """Scale the noise of each block until the model's SQNR is the twin's everywhere, and leave the round that came nearest.

        A block goes half as far as before whenever it went too far. Raises where no round comes within the tolerance.
        """
        wanted, site_of = errors.of(twin), _sites(vlm, layers, errors.scheme)
        share, last = dict.fromkeys(wanted, SHARE), dict.fromkeys(wanted, 0.0)
        best: dict[str, float] = {}
        nearest, factors = float("inf"), dict[Imitation, Tensor]()
        for rounds_left in reversed(range(ROUNDS + 1)):
            found = errors.of(vlm)
            gaps = {site: found[site] - level for site, level in wanted.items()}
            worst = max(map(abs, gaps.values()))
            if worst < nearest or not best:
                best, nearest, factors = found, worst, {noise: noise.factor.clone() for noise in _noises(layers)}
            if worst <= self.tolerance_db / 3 or not rounds_left:
                break
            share = {site: part * (0.5 if gaps[site] * last[site] < 0 else 1.0) for site, part in share.items()}
            last = gaps
            for name, layer in layers.items():
                site, before = site_of[name]
                step = 10 ** (share[site] * _own_gap(wanted, found, site, before) / 20)
                for noise in _noises({name: layer}):
                    noise.set_factor(noise.factor * step)
        for noise, factor in factors.items():
            noise.set_factor(factor)
        require_matched(wanted, best, self.tolerance_db)


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

    Noise-to-signal ratios of neighbouring sites are subtracted; where that leaves nothing, the site's own gap is taken. The step
    is bounded, so that noise that other blocks hand on does not run away.
    """
    own = [
        10 ** (-level[site] / 10) - (0.0 if before is None else 10 ** (-level[before] / 10))
        for level in (wanted, found)
    ]
    gap = found[site] - wanted[site]
    if min(own) > 0:
        ratio = torch.tensor(own[0] / own[1])
        gap = float(10 * ratio.log10())
    return max(-6.0, min(6.0, gap))
