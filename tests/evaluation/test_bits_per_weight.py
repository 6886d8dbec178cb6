"""Bits per weight of a model are those that its layers have."""

from types import SimpleNamespace

import pytest
from cases.quant import build, make_batches, shallow

from lightning_vlmq.evaluation.about import BITS_PER_WEIGHT, coverage_rows
from lightning_vlmq.quant import LayerRule, QuantScheme, quantize, quantized_layers

SETS = [SimpleNamespace(name="concepts", role="id")]


def measured(method, scheme):
    vlm = shallow(build("vit_clean"))
    made = quantize(vlm, method, scheme, make_batches(vlm))
    rows = {row.metric: row.value for row in coverage_rows(SETS, made.coverage, made.scheme, vlm)}
    total = sum(row.weights for row in made.coverage.rows)
    return rows[BITS_PER_WEIGHT], {name: layer.weight for name, layer in quantized_layers(vlm).items()}, total


def test_rules_count():
    scheme = QuantScheme(4, 8, first_last="w8a8", overrides=[LayerRule("*.c_fc", weight_bits=6)])
    bits, weights, total = measured("minmax", scheme)
    widths = {name: 6 if name.endswith("c_fc") else 8 if "conv1" in name else 4 for name in weights}
    quantized = sum(w.numel() for w in weights.values())
    assert quantized < total  # the text tower is not
    low = (sum(widths[n] * w.numel() for n, w in weights.items()) + 32 * (total - quantized)) / total
    assert low <= bits < low + 4 * max(w.numel() for w in weights.values()) / total  # the last layer has eight bits too
    assert bits != pytest.approx((4 * quantized + 32 * (total - quantized)) / total)


def test_mixed_widths_have_the_size_of_the_uniform_one():
    scheme = QuantScheme(4, 8, scope="vision_text")
    uniform, *_ = measured("minmax", scheme)
    mixed, *_ = measured("spectral_mixed", scheme)
    assert uniform * 0.995 <= mixed <= uniform


def test_a_low_rank_term_counts():
    scheme = QuantScheme(4, 8, scope="vision_text")
    uniform, weights, total = measured("minmax", scheme)
    found, *_ = measured("lowrank_compensation(rank=3)", scheme)
    term = sum(3 * (w.shape[0] + w[0].numel()) for w in weights.values() if w.shape[0] > 3 < w[0].numel())
    assert found == pytest.approx(uniform + 32 * term / total, rel=1e-6)
