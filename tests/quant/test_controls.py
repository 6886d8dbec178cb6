"""Controls in place of a quantization, on small models with random weights."""

import numpy as np
import pytest
import torch
from cases.quant import build, make_batches, twin

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import load_vlm
from lightning_vlmq.quant import METHODS, QuantConv2d, QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.imitated import ErrorObserver, Imitation, SiteErrors, observe_errors, require_matched
from lightning_vlmq.quant.ptq.matched_noise import MatchedNoise
from lightning_vlmq.quant.ptq.rank_truncation import RankTruncation
from lightning_vlmq.quant.ptq.spectral_shrink import SpectralShrink
from lightning_vlmq.spectral import as_matrix, filter_gains

SCHEME = QuantScheme(weight_bits=4, act_bits=8, scope="vision")


@pytest.fixture(scope="module")
def start():
    vlm = build("vit_clean")
    batches = make_batches(vlm, (24, 24))
    quantized = twin(vlm)
    quantize(quantized, "minmax", SCHEME, batches)
    return vlm, batches, quantized.eval()


def controlled(start, method):
    vlm, batches, _ = start
    control = twin(vlm)
    method.prepare(control, SCHEME, batches)
    return control.eval()


@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "sign_flip"])
def test_noise_is_as_strong_as_quantization_after_every_block(start, distribution):
    vlm, batches, quantized = start
    control = controlled(start, MatchedNoise(distribution=distribution))
    errors = SiteErrors(vlm, SCHEME, batches)
    wanted, found = errors.of(quantized), errors.of(control)
    assert len(wanted) >= 3
    for site, level in wanted.items():
        assert found[site] == pytest.approx(level, abs=0.5), site


@pytest.fixture(scope="module")
def convolutions():
    """The embedded EfficientNet-like model, with what it has learned, and its GPTQ, whose errors make up for one another."""
    vlm = load_vlm("align_clean").eval()
    batches = make_batches(vlm, (24, 24))
    quantized = twin(vlm)
    quantize(quantized, "gptq", SCHEME, batches)
    return vlm, batches, quantized.eval()


def test_noise_is_as_strong_as_gptq_on_convolutions(convolutions):
    vlm, batches, quantized = convolutions
    control = controlled(convolutions, MatchedNoise(pattern="gptq"))
    errors = SiteErrors(vlm, SCHEME, batches)
    wanted, found = errors.of(quantized), errors.of(control)
    assert len(wanted) >= 3
    for site, level in wanted.items():
        assert found[site] == pytest.approx(level, abs=0.5), site


def test_noise_for_gptq_has_its_errors_strength_at_every_layers_output_before_scaling(convolutions, monkeypatch):
    vlm, batches, quantized = convolutions
    monkeypatch.setattr(MatchedNoise, "match", lambda *args: None)
    control = controlled(convolutions, MatchedNoise(pattern="gptq"))
    weights = {name: dict(vlm.named_modules())[name].weight for name in quantized_layers(quantized)}
    wanted = observe_errors(quantized, weights, SCHEME, batches)
    found = observe_errors(control, weights, SCHEME, batches)
    decibels = [10 * np.log10(found[name].output_error / wanted[name].output_error) for name in wanted]
    assert np.median(np.abs(decibels)) < 0.5 and np.max(np.abs(decibels)) < 3, decibels
    with torch.no_grad():
        drawn, patterns = (
            {
                name: float((layer.effective_weight() - weights[name]).norm())
                for name, layer in quantized_layers(m).items()
            }
            for m in (control, quantized)
        )
    norms = [drawn[name] / patterns[name] for name in drawn]
    assert 0.6 < min(norms) < max(norms) < 1.6 and 0.9 < np.median(norms) < 1.1, (
        norms
    )  # and in weight space, where GPTQ's are large


def test_noise_that_comes_in_too_strong_is_said_to_be_handed_on(start, monkeypatch):
    """The pattern is changed to one whose errors vanish at the output alone."""
    of = SiteErrors.of

    def vanishing(self, vlm):
        found = of(self, vlm)
        is_control = any(isinstance(layer.act_fake_quant, Imitation) for layer in quantized_layers(vlm).values())
        return found if is_control else found | {"vision/output": found["vision/output"] + 20}

    monkeypatch.setattr(SiteErrors, "of", vanishing)
    with pytest.raises(VLMQError, match=r"blocks before it alone is too strong"):
        controlled(start, MatchedNoise())


def test_noise_before_scaling_has_the_power_of_the_errors(start):
    _, _, quantized = start
    control, patterns = controlled(start, MatchedNoise()), quantized_layers(start[2])
    for name, layer in quantized_layers(control).items():
        noise = (layer.effective_weight() - layer.weight) / layer.weight_fake_quant.factor
        error = patterns[name].effective_weight() - layer.weight
        torch.testing.assert_close(as_matrix(noise).norm(dim=1), as_matrix(error).norm(dim=1), rtol=1e-3, atol=1e-5)
        cosine = float((noise * error).detach().sum() / noise.norm() / error.norm())
        assert abs(cosine) < 6 / noise.numel() ** 0.5  # another direction
    del quantized


def test_seeds_repeat_and_differ(start):
    images = start[1][0]["image"]
    first, again, other = (controlled(start, MatchedNoise(seed=seed)) for seed in (1, 1, 2))
    with torch.no_grad():
        features = [vlm.encode_image(images) for vlm in (first, again, other, first)]
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[3])
    assert (features[0] - features[2]).abs().max() > 1e-4


def test_noise_is_that_of_a_place_in_the_batch(start):
    """So that numbers depend on the batch size, as the docstring says: an image alone has the noise of the first one."""
    images, control = start[1][0]["image"][:2], controlled(start, MatchedNoise())
    with torch.no_grad():
        both, first, second = (control.encode_image(x) for x in (images, images[:1], images[1:]))
        swapped = control.encode_image(images.flip(0))
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swapped[:1], second, rtol=1e-4, atol=1e-5)
    assert (both[1:] - second).norm() > 1e-3


def test_noise_drawn_at_each_forward_changes_and_repeats_from_the_start(start):
    images = start[1][0]["image"]
    one, two = (controlled(start, MatchedNoise(draw="each_forward", tolerance_db=2.0)) for _ in range(2))
    with torch.no_grad():
        first, second = one.encode_image(images), one.encode_image(images)
        assert (first - second).abs().max() > 1e-4
        assert torch.equal(first, two.encode_image(images))


def test_a_control_that_is_no_match_is_refused():
    require_matched({"a": 20.0, "b": float("inf")}, {"a": 20.4, "b": float("inf")}, 0.5)
    with pytest.raises(VLMQError, match=r"SQNR at a is 20\.60 dB"):
        require_matched({"a": 20.0}, {"a": 20.6}, 0.5)
    with pytest.raises(VLMQError, match="no match"):
        require_matched({"a": 20.0}, {"a": float("nan")}, 0.5)


def test_imitated_activation_noise_has_its_power():
    vlm = build("vit_clean")
    layer = next(iter(quantized_layers_of(vlm).values()))
    noise = Imitation.of(layer.act_fake_quant)
    noise.power.fill_(0.04)
    x = torch.randn(200, 50)
    for distribution in ("gaussian", "uniform"):
        noise.distribution = distribution
        assert float((noise(x) - x).square().mean()) == pytest.approx(0.04, rel=0.05)
    noise.enabled = False
    assert noise(x) is x


def quantized_layers_of(vlm):
    quantize(vlm, "minmax", SCHEME, make_batches(vlm))
    return quantized_layers(vlm)


def test_observed_errors_are_those_of_each_layer_alone(start):
    vlm, batches, quantized = start
    weights = {name: dict(vlm.named_modules())[name].weight for name in quantized_layers(quantized)}
    observed = observe_errors(quantized, weights, SCHEME, batches)
    name = next(n for n in observed if n.endswith("c_fc"))
    seen = []
    hook = dict(vlm.named_modules())[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            vlm.encode_image(batch["image"])
    hook.remove()
    x, layer = torch.cat(seen), quantized_layers(quantized)[name]
    with torch.no_grad():
        rounded = layer.act_fake_quant(x)
        error = rounded @ layer.effective_weight().T - x @ weights[name].T
    assert observed[name].input_power == pytest.approx(float((rounded - x).square().mean()), rel=1e-3)
    assert observed[name].output_error == pytest.approx(float(error.square().sum(-1).mean()), rel=1e-3)
    assert isinstance(observed[name], ErrorObserver)


@pytest.mark.parametrize("keep", ["top", "bottom"])
@pytest.mark.parametrize("weighting", ["plain", "activation"])
def test_truncation_loses_ranks_and_nothing_else(start, keep, weighting):
    control = controlled(start, RankTruncation(keep=keep, weighting=weighting))
    cut = 0
    for layer in quantized_layers(control).values():
        weight, changed = as_matrix(layer.weight).double(), as_matrix(layer.effective_weight()).double()
        rank = int(torch.linalg.matrix_rank(changed, rtol=1e-5))
        assert rank < min(weight.shape)
        cut += min(weight.shape) - rank
        if weighting == "plain":  # the directions that are left are the weight's own
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            left = torch.diagonal(u.mT @ changed @ vt.mT) / s
            expected = (torch.arange(len(s)) < rank) if keep == "top" else (torch.arange(len(s)) >= len(s) - rank)
            torch.testing.assert_close(left, expected.double(), rtol=1e-3, atol=1e-3)
    assert cut > 0


def test_truncation_has_the_output_error_of_quantization(start):
    vlm, batches, quantized = start
    weights = {name: dict(vlm.named_modules())[name].weight for name in quantized_layers(quantized)}
    wanted = observe_errors(quantized, weights, SCHEME, batches)
    control = controlled(start, RankTruncation())
    found = observe_errors(control, weights, SCHEME, batches)
    ratios = [np.log2(found[name].output_error / wanted[name].output_error) for name in wanted]
    assert np.median(np.abs(ratios)) < 0.5 and np.max(np.abs(ratios)) < 3  # octaves; one rank more or less is a step


def test_shrinking_has_the_gains_of_quantization_and_no_noise(start):
    _, _, quantized = start
    control, patterns = controlled(start, SpectralShrink()), quantized_layers(quantized)
    for name, layer in quantized_layers(control).items():
        smooth, _ = filter_gains(layer.weight, patterns[name].effective_weight())
        _, measured = filter_gains(layer.weight, layer.effective_weight())
        torch.testing.assert_close(measured, smooth.clamp(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["matched_noise", "rank_truncation", "spectral_shrink"])
def test_controls_are_covered_like_their_pattern(method):
    vlm = build("convnext_clean")
    coverage = quantize(vlm, method, SCHEME, make_batches(vlm, (16,))).coverage
    assert coverage.weight_share(("vision",)) > 0.95
    depthwise = [
        layer for layer in quantized_layers(vlm).values() if isinstance(layer, QuantConv2d) and layer.groups > 1
    ]
    assert depthwise
    if method != "matched_noise":  # they have no singular directions across their channels
        assert all(torch.equal(layer.effective_weight(), layer.weight) for layer in depthwise)
    others = [layer for layer in quantized_layers(vlm).values() if layer not in depthwise]
    assert others and not any(torch.equal(layer.effective_weight(), layer.weight) for layer in others)
    assert METHODS[method].is_control


def test_a_control_is_not_saved(start, tmp_path):
    from lightning_vlmq.quant import Quantized, measure_coverage, save_quantized

    with pytest.raises(VLMQError, match="cannot be saved"):
        save_quantized(
            controlled(start, SpectralShrink()),
            tmp_path,
            Quantized(SpectralShrink(), SCHEME, measure_coverage(start[2])),
        )
    assert not list(tmp_path.iterdir())
