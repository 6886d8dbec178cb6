import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cases.quant import build, make_batches, shallow, twin
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn
from torch.func import functional_call, hessian

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import LayerRule, QuantScheme, quantized_layers
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.sensitivity import (
    band_noise,
    first_pairs,
    free_layers,
    hessian_costs,
    hessian_traces,
    noise_share,
    output_costs,
    pair_loss,
)

FIT = METHODS["minmax"].fit_weight


def exact_traces(net, loss):
    """By torch.func's dense Hessian: one block of it per weight."""
    weights = dict(net.named_parameters())
    blocks = hessian(lambda w: loss(lambda x: functional_call(net, w, x)))(weights)
    return {n: torch.einsum("abab->", blocks[n][n]).item() for n in weights}


def test_hutchinson_on_a_tiny_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(40, 5).double(), torch.randint(0, 3, (40,))

    def loss(run):
        return nn.functional.cross_entropy(3 * run(x), y)

    exact = exact_traces(net, loss)
    runs = [hessian_traces([lambda: loss(net)], dict(net.named_parameters()), 60, seed) for seed in range(8)]
    for name, trace in exact.items():
        drawn = np.array([run[name] for run in runs])
        stderr = drawn.std(ddof=1) / math.sqrt(len(drawn))
        assert abs(drawn.mean() - trace) < 4 * stderr and stderr < 0.1 * abs(trace)


def test_hutchinson_is_exact_on_a_diagonal_hessian_and_means_over_batches():
    weights = {"a": torch.randn(3, 4, requires_grad=True), "b": torch.randn(5, requires_grad=True)}
    curvature = torch.rand(3, 4)
    losses = [lambda: (curvature * weights["a"] ** 2).sum(), lambda: 3 * (weights["a"] ** 2).sum()]
    found = hessian_traces(losses, weights, probes=1)
    assert found["a"] == pytest.approx(float(curvature.sum()) + 3 * 12, rel=1e-6)
    assert found["b"] == 0  # takes no part


@pytest.mark.parametrize("name", ["vit_clean", "siglip_clean"])
def test_the_loss_is_the_one_of_open_clip(name):
    vlm = build(name)
    batch = make_batches(vlm, (6,))[0]
    with torch.no_grad():
        image, text = vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])
        own = SigLipLoss() if vlm.is_sigmoid else ClipLoss()
        extra = (vlm.logit_bias(),) if vlm.is_sigmoid else ()
        torch.testing.assert_close(pair_loss(vlm, batch), own(image, text, vlm.logit_scale(), *extra))


@pytest.fixture(scope="module")
def vit() -> VLM:
    return shallow(build("vit_clean"))


def test_output_costs_are_those_of_a_full_svd(vit):
    """One layer rounded by hand, both feature matrices decomposed by numpy."""
    scheme, batches = QuantScheme(4, 8, scope="vision_text"), make_batches(vit, (6, 3))
    name = next(n for n in free_layers(vit, scheme) if n.endswith("mlp.c_fc"))
    layer = vit.get_submodule(name)
    x = torch.cat([b["image"] for b in batches])
    with torch.no_grad():
        z = vit.encode_image(x).double().numpy()
        before = layer.weight.clone()
        step = torch.maximum(
            before.amax(1, keepdim=True).clamp_min(0) / 3, -before.amin(1, keepdim=True).clamp_max(0) / 4
        )
        rounded = (before / step).round().clamp(-4, 3) * step
        layer.weight.copy_(rounded)
        q = vit.encode_image(x).double().numpy()
        layer.weight.copy_(before)
    _, s, vt = np.linalg.svd(z, full_matrices=False)
    noise = np.square((q - z) @ vt.T).sum(0)
    for start, stop in ((0, 3), (1, 5)):
        costs = output_costs(vit, scheme, batches, (3,), FIT, partial(band_noise, start=start, stop=stop))
        assert costs[name][3] == pytest.approx(float((noise / s**2)[start:stop].sum()), rel=0.02)
    share = output_costs(vit, scheme, batches, (3,), FIT, noise_share)[name][3]
    assert share == pytest.approx(np.square(q - z).sum() / np.square(z).sum(), rel=0.02)


def test_finer_grids_cost_less_and_both_towers_count(vit):
    scheme, batches = QuantScheme(4, 8, scope="vision_text"), make_batches(vit)
    for costs in (
        output_costs(vit, scheme, batches, (2, 8), FIT, noise_share),
        hessian_costs(vit, scheme, batches, (2, 8), FIT, 4),
    ):
        assert {vit.tower_of(name) for name in costs} == {"vision", "text"}
        assert all(own[8] <= own[2] for own in costs.values())
        assert sum(own[2] for own in costs.values()) > 50 * sum(own[8] for own in costs.values()) > 0
    assert all(not p.requires_grad or p.grad is None for p in vit.parameters())


def test_hawq_costs_are_trace_times_error(vit):
    """The same signs give the same traces, so that costs on another grid differ by its error alone."""
    batches, found = make_batches(vit), {}
    for granularity in ("per_channel", "per_tensor"):
        scheme = QuantScheme(4, 8, weight_granularity=granularity)
        own = METHODS["minmax"].prepare(twin(vit), replace(scheme, weight_bits=3, act_bits=16), batches)
        with torch.no_grad():
            errors = {
                n: float((q.effective_weight() - q.weight).square().sum()) for n, q in quantized_layers(own).items()
            }
        costs = hessian_costs(vit, scheme, batches, (3,), FIT, 2, seed=5)
        found[granularity] = {name: own[3] / errors[name] for name, own in costs.items()}
    assert max(found["per_channel"].values()) > 0
    assert found["per_channel"] == pytest.approx(found["per_tensor"], rel=1e-4)


def test_traces_below_zero_are_said(vit, caplog):
    costs = hessian_costs(vit, QuantScheme(4, 8), make_batches(vit), (3,), FIT, 2, seed=5)
    bent = sum(own[3] == 0 for own in costs.values())
    assert 0 < bent < len(costs)
    assert f"below zero in {bent} of {len(costs)} layers" in caplog.text


def test_what_is_fixed_is_not_free(vit):
    everything = free_layers(vit, QuantScheme(4, 8, scope="vision_text"))
    ruled = QuantScheme(
        4,
        8,
        scope="vision_text",
        first_last="w8a8",
        overrides=[
            LayerRule("*.c_fc", weight_bits=5),
            LayerRule("*.out_proj", act_bits=6),
            LayerRule("*.q_proj", skip=True),
        ],
    )
    free = free_layers(vit, ruled)
    gone = set(everything) - set(free)
    assert all(name in gone for name in everything if name.endswith(("c_fc", "q_proj", "conv1")))
    assert any(name.endswith("out_proj") for name in free)
    assert not any(name.startswith("model.text_decoder") for name in free_layers(build("coca_clean"), ruled))


def test_pairs_that_tell_nothing_are_refused(vit):
    scheme = QuantScheme(4, 8, scope="vision_text")
    batches = make_batches(vit)
    assert [len(b["image"]) for b in first_pairs(batches, 6)] == [4, 2]
    with pytest.raises(VLMQError, match="none from 40 on"):
        output_costs(vit, scheme, batches, (4,), FIT, lambda table: band_noise(table, 40, None))
    images = [{"image": b["image"]} for b in batches]
    with pytest.raises(VLMQError, match="has no 'tokens'"):
        output_costs(vit, scheme, images, (4,), FIT, noise_share)
    with pytest.raises(VLMQError, match="with tokens"):
        hessian_costs(vit, QuantScheme(4, 8), images, (4,), FIT, 1)
