"""Selective prediction from counts: bounds hold on any data, some data meet them, on ordinary data they are small."""

from itertools import permutations

import pytest
import torch
from cases.metric_tester import batches

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import equal_width_bin_sums

NAMES = ("aurc", "coverage_at_risk")


def selective_counts(confidence, correct, cells):
    sums = equal_width_bin_sums(confidence, correct, cells)
    return m.SelectiveCounts(sums.count.long(), sums.correct.long())


def bounded_and_exact(confidence, correct, cells, risk):
    counts = selective_counts(confidence, correct, cells)
    return {
        "aurc": (counts.aurc(), m.aurc(confidence, correct)),
        "coverage_at_risk": (counts.coverage_at_risk(risk), m.coverage_at_risk(confidence, correct, risk)),
    }


def sample(n, shape, generator):
    confidence = torch.rand(n, generator=generator)
    confidence = {
        "uniform": confidence,
        "sharp": 1 - confidence**6,
        "tied": (confidence * 9).round() / 9,
        "saturated": (1.2 * confidence).clamp(max=1),
    }[shape]
    return confidence, torch.rand(n, generator=generator) < 0.3 + 0.7 * confidence


@pytest.mark.parametrize("shape", ["uniform", "sharp", "tied", "saturated"])
@pytest.mark.parametrize("cells", [1, 3, 20, 1000])
@pytest.mark.parametrize("n", [1, 2, 7, 60, 2000])
def test_bounds_hold(n, cells, shape):
    generator = torch.Generator().manual_seed(n + cells)
    for _ in range(20):
        confidence, correct = sample(n, shape, generator)
        for risk in (0.0, 0.05, 0.2, 0.5, 1.0, float(torch.rand((), generator=generator))):
            for name, (bounded, exact) in bounded_and_exact(confidence, correct, cells, risk).items():
                assert (bounded.value - exact).abs() <= bounded.error_bound + 1e-12, (name, risk)


@pytest.mark.parametrize("risk", [0.0, 0.05, 0.25, 1 / 3, 0.6])
@pytest.mark.parametrize("arrange", ["errors first", "errors last", "alternating"])
def test_bounds_hold_on_adversarial_cells(arrange, risk):
    generator = torch.Generator().manual_seed(3)
    for cells in (1, 4, 9):
        for n in (5, 40, 400):
            confidence, correct = sample(n, "uniform", generator)
            cell = (confidence * cells).floor()
            key = {"errors first": ~correct, "errors last": correct, "alternating": torch.arange(n) % 2}[arrange]
            # inside each cell the arrangement decides, with distinct confidences
            rank = (key.double() + torch.rand(n, generator=generator).double() * 0.9) / 2
            for name, (bounded, exact) in bounded_and_exact((cell + rank) / cells, correct, cells, risk).items():
                assert (bounded.value - exact).abs() <= bounded.error_bound + 1e-12, (name, cells, n)


@pytest.mark.parametrize("hits", ["0", "1", "011", "0011", "01111", "00001", "101010"])
@pytest.mark.parametrize("risk", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75])
def test_ends_are_those_of_all_orders(hits, risk):
    """A cell of up to six samples, with single samples above and below: brute force over its orders meets the bounds."""
    above, inside, below = [1, 0, 1], [int(hit) for hit in hits], [1, 0]
    counts = m.SelectiveCounts(
        torch.tensor([1, 1, len(inside), 1, 1, 1, 0]), torch.tensor([*below[::-1], sum(inside), *above[::-1], 0])
    )
    distinct = torch.arange(5 + len(inside)).flip(0) / 20
    tied = distinct.clone()
    tied[3:-2] = tied[3]
    aurcs, coverages = [], []
    for order in set(permutations(inside)):
        for confidence in (distinct, tied):
            correct = torch.tensor([*above, *order, *below]).bool()
            aurcs.append(float(m.aurc(confidence, correct)))
            coverages.append(float(m.coverage_at_risk(confidence, correct, risk)))
    area, coverage = counts.aurc(), counts.coverage_at_risk(risk)
    spread = max(max(aurcs) - float(area.value), float(area.value) - min(aurcs))
    assert spread == pytest.approx(float(area.error_bound), abs=1e-12)
    assert min(coverages) == pytest.approx(float(coverage.value), abs=1e-12)
    assert max(coverages) == pytest.approx(float(coverage.value + coverage.error_bound), abs=1e-12)


@pytest.mark.parametrize("risk", [0.02, 0.05, 0.2])
def test_bounds_are_small(risk):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(100_000, generator=generator)
    correct = torch.rand(100_000, generator=generator) < confidence**0.5
    for name, (bounded, exact) in bounded_and_exact(confidence, correct, 16_384, risk).items():
        assert bounded.error_bound < 1e-3, name
        assert (bounded.value - exact).abs() <= bounded.error_bound


def test_exact_when_a_cell_holds_only_ties():
    confidence = torch.randint(12, (500,)) / 10  # up to 1, which has a cell of its own
    confidence = confidence.clamp(max=1)
    correct = torch.rand(500) < confidence
    counts = selective_counts(confidence + 0.01 * (confidence < 1), correct, 10)
    assert counts.aurc().value.item() == pytest.approx(m.aurc(confidence, correct).item(), abs=1e-12)
    assert counts.coverage_at_risk(0.2).value == m.coverage_at_risk(confidence, correct, 0.2)
    sure = selective_counts(torch.ones(9), torch.arange(9) < 4, 5)
    assert sure.aurc().value == pytest.approx(5 / 9) and sure.aurc().error_bound == 0
    assert sure.coverage_at_risk(0.3).error_bound == 0


def test_nothing_is_uncertain_where_all_are_right_or_wrong():
    for correct in (torch.ones(50).bool(), torch.zeros(50).bool()):
        for name, (bounded, exact) in bounded_and_exact(torch.rand(50), correct, 1, 0.1).items():
            assert bounded.error_bound == pytest.approx(0, abs=1e-14), name
            assert bounded.value == pytest.approx(float(exact), abs=1e-12), name


def test_metric_streams_and_brackets_the_exact_ones():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(20_000, 6, generator=generator)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    target[::4] = -1
    exact = {"aurc": m.AURC(), "coverage_at_risk": m.CoverageAtRisk(risk=0.1)}
    metric = m.BinnedSelectivePrediction(risk=0.1)
    sizes = [1, 9999, 0, 10_000]
    for i, batch in enumerate(batches({"logits": logits, "target": target}, sizes)):
        batch["logits"] = batch["logits"].double() if i % 2 else batch["logits"]
        for each in (metric, *exact.values()):
            each.update(**batch)
    result = metric.compute()
    assert result.keys() == {*NAMES, *(f"{name}_error_bound" for name in NAMES)}
    for name in NAMES:
        assert result[f"{name}_error_bound"] < 2e-3, name
        assert (result[name] - exact[name].compute()).abs() <= result[f"{name}_error_bound"] + 1e-12, name
    assert result["coverage_at_risk"] <= exact["coverage_at_risk"].compute() + 1e-12


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_degenerate():
    metric = m.BinnedSelectivePrediction()
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.full((2, 3), torch.nan), torch.tensor([-1, -1]))  # without a class: they change nothing
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    assert metric.compute()["aurc"] == 0 and metric.compute()["coverage_at_risk"] == 1
    metric.update(torch.full((1, 2), torch.nan), torch.tensor([0]))
    assert all(value.isnan() for value in metric.compute().values())
    wrong = m.BinnedSelectivePrediction()
    wrong.update(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
    result = wrong.compute()
    assert result["aurc"] == 1 and result["aurc_error_bound"] == 0
    assert result["coverage_at_risk"] == 0 and result["coverage_at_risk_error_bound"] == 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.BinnedSelectivePrediction(cells=0), "cells must be at least 1"),
        (lambda: m.BinnedSelectivePrediction(risk=-0.1), "risk is an error rate"),
        (lambda: m.SelectiveCounts(torch.ones(2), torch.ones(2)).coverage_at_risk(2.0), "risk is an error rate"),
        (lambda: m.BinnedSelectivePrediction().update(torch.zeros(2, 3), torch.zeros(3).long()), "logits must be"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
