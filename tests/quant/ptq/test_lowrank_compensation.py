import copy
from itertools import pairwise

import pytest
import torch
from cases.quant import SEEDS, build, make_batches, outlier_layer, second_moment, squared_output_error

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import METHODS, QuantScheme, quantize, quantized_layers, save_quantized
from lightning_vlmq.quant.clipping import count_clipped, judge
from lightning_vlmq.quant.ptq.lowrank_compensation import Compensated, LowRankCompensation
from lightning_vlmq.spectral import as_matrix

KINDS = ("lqer", "qera", "svdquant")
SCHEME = QuantScheme(weight_bits=3, act_bits=16)


def errors(kind, layer, x, ranks):
    moment = second_moment(layer, x)[0]
    found = []
    for rank in ranks:
        with torch.no_grad():
            effective = LowRankCompensation(kind=kind, rank=rank).compensate(layer, moment)(layer.weight)
        found.append((effective, squared_output_error(layer, x, effective, layer.weight)))
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_error_falls_with_rank_to_nothing(kind, seed):
    layer, x = outlier_layer(kind, SCHEME, seed)
    full = min(as_matrix(layer.weight).shape)
    for method in KINDS:
        found = errors(method, layer, x, (0, 2, 6, 12, full))
        sizes = [
            float((weight - layer.weight).detach().square().sum()) if method == "lqer" else error
            for weight, error in found
        ]
        if method != "svdquant":  # what it rounds changes with the rank, and with it the grid
            assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(sizes))
        torch.testing.assert_close(found[-1][0], layer.weight, rtol=1e-4, atol=1e-5)  # full rank gives it back
        assert sizes[-1] < 1e-6 * sizes[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_weighted_term_loses_least_output(seed):
    layer, x = outlier_layer("linear", SCHEME, seed)
    (_, plain), (_, weighted) = (errors(kind, layer, x, (4,))[0] for kind in ("lqer", "qera"))
    assert weighted < plain


@pytest.mark.parametrize("seed", SEEDS)
def test_a_grid_is_judged_by_what_it_rounds(seed):
    """A weight whose leading part is far beyond the grid of the rest clips nothing: that part is not rounded."""
    generator = torch.Generator().manual_seed(seed)
    layer, x = outlier_layer("linear", SCHEME, seed)
    with torch.no_grad():
        ends = [torch.randn(n, generator=generator) for n in layer.weight.shape]
        layer.weight += 100 * torch.outer(*ends)
        quantizer = LowRankCompensation(kind="svdquant", rank=2).compensate(layer, second_moment(layer, x)[0])
        assert isinstance(quantizer, Compensated)
        assert judge(layer.weight, quantizer).shares == (0.0, 0.0)
        assert [int(n) for n in count_clipped(layer.weight, quantizer)] == [0, 0]
        quantizer.set_qparams(quantizer.scale / 4)  # a grid that does clip, found as of a weight that is rounded alone
        rest = copy.deepcopy(layer.weight_fake_quant)
        rest.set_qparams(quantizer.scale)
        assert judge(layer.weight, quantizer) == judge(layer.weight - quantizer.before, rest)
        assert sum(judge(layer.weight, quantizer).shares) > 0.1


def test_the_term_has_its_rank_and_rank_zero_is_round_to_nearest():
    layer, x = outlier_layer("linear", SCHEME)
    moment = second_moment(layer, x)[0]
    with torch.no_grad():
        quantizer = LowRankCompensation(kind="lqer", rank=3).compensate(layer, moment)
        assert int(torch.linalg.matrix_rank(quantizer.term, rtol=1e-5)) == 3
        plain = LowRankCompensation(kind="lqer", rank=0).compensate(layer, moment)(layer.weight)
        METHODS["minmax"].fit_weight(layer)
        assert torch.equal(plain, layer.weight_fake_quant(layer.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models(kind):
    for name in ("vit_clean", "convnext_clean"):
        vlm = build(name)
        batches = make_batches(vlm)
        with torch.no_grad():
            before = vlm.encode_image(batches[0]["image"])
        LowRankCompensation(kind=kind, rank=10_000).prepare(vlm, QuantScheme(weight_bits=2, act_bits=16), batches)
        with torch.no_grad():
            error = (vlm.encode_image(batches[0]["image"]) - before).abs().max()
        if name == "vit_clean":  # every layer has all its ranks back
            assert error < 1e-4
        assert torch.isfinite(error)
    assert quantize(build("vit_clean"), "lowrank_compensation", QuantScheme(), make_batches(build("vit_clean")))


def test_it_is_not_converted_to_integers(tmp_path):
    vlm = build("vit_clean")
    made = quantize(vlm, "lowrank_compensation", QuantScheme(), make_batches(vlm))
    with pytest.raises(VLMQError, match="not integers"):
        save_quantized(vlm, tmp_path, made)
    layer = next(iter(quantized_layers(vlm).values()))
    with pytest.raises(VLMQError, match="not integers"):
        layer.weight_fake_quant.integers(layer.weight)
