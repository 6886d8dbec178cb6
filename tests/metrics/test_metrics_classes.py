import pytest
import torch
from metric_cases import C, make_cases
from metric_tester import SPLITS, assert_equal, check_metric, check_plot, run_two_processes

from lightning_vlmq import metrics as m
from lightning_vlmq.errors import VLMQError

CASES = make_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_splits_and_life_cycle(case):
    check_metric(case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("records", "classwise_jackknife")], ids=lambda case: case.name
)
def test_plot(case):
    check_plot(case.build(), case.columns)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_two_processes(CASES, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_agree_with_one(two_processes, case, split):
    for results in two_processes:
        assert_equal(results[case.name, split], case.expected, case.atol)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(c.expected, dict)], ids=lambda case: case.name)
def test_no_samples_is_nan(case):
    assert case.build().compute().isnan().all()
    metric = case.build()
    metric.update(**{name: values[:0] for name, values in case.columns.items()})
    assert metric.compute().isnan().all()


@pytest.mark.parametrize(
    "build",
    [
        m.BrierScore,
        m.NegativeLogLikelihood,
        m.CalibrationError,
        m.MaximumCalibrationError,
        m.AdaptiveCalibrationError,
        m.AURC,
        lambda: m.ClasswiseCalibrationError(num_classes=C),
    ],
)
def test_broken_logits_show(build):
    logits = torch.randn(10, C)
    logits[3, 2] = torch.nan
    metric = build()
    metric.update(logits, torch.arange(10) % C)
    assert metric.compute().isnan()


def test_broken_predictions_agree_with_nothing():
    logits = torch.eye(4)
    broken = logits.clone()
    broken[0, 0], broken[1, 1], broken[2] = torch.nan, torch.inf, -torch.inf
    metric = m.Agreement()
    metric.update(broken, broken)
    assert metric.compute() == 0.25
    metric.reset()
    metric.update(torch.tensor([-1, 2]), torch.tensor([-1, 2]))
    assert metric.compute() == 0.5


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.FPR95(positive="in"), "unknown positive class 'in'"),
        (lambda: m.CalibrationError(n_bins=0), "n_bins must be at least 1"),
        (lambda: m.CalibrationError(norm="l3"), "unknown norm 'l3'"),
        (lambda: m.AdaptiveCalibrationError(n_bins=-1), "n_bins must be at least 1"),
        (lambda: m.AdaptiveCalibrationError(norm="x"), "unknown norm"),
        (lambda: m.ClasswiseCalibrationError(num_classes=0), "at least 1"),
        (lambda: m.ClasswiseCalibrationError(num_classes=3).update(torch.zeros(2, 4), torch.zeros(2)), r"\[n, 3\]"),
        (lambda: m.Agreement().update(torch.zeros(2, 4), torch.zeros(3).long()), "same samples"),
        (lambda: m.RelativeSpuriousGap().update(torch.ones(2).bool(), torch.ones(3).bool()), "must be"),
        (lambda: m.FPR95().update(torch.zeros(2), torch.ones(3).bool()), "same n"),
        (lambda: m.BrierScore().update(torch.zeros(2, 3), torch.tensor([0, 3])), r"targets must lie in \[-1, 3\)"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
