import pytest
import torch
from cases.metric_tester import SPLITS, assert_equal, check_metric, check_plot, run_two_processes
from cases.metrics import C, make_cases

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError

CASES = make_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_splits_and_life_cycle(case):
    check_metric(case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("records", "classwise_gaps")], ids=lambda case: case.name
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
        lambda: m.CalibrationError(temperature=2.0),
        m.MaximumCalibrationError,
        m.AdaptiveCalibrationError,
        m.AURC,
        m.CoverageAtRisk,
        lambda: m.ClasswiseCalibrationError(num_classes=C),
    ],
)
def test_broken_logits_show(build):
    logits = torch.randn(10, C)
    logits[3, 2] = torch.nan
    metric = build()
    metric.update(logits, torch.arange(10) % C)
    assert metric.compute().isnan()


def test_temperature_is_the_fitted_one_and_may_be_undefined():
    logits, target = 3 * torch.randn(200, C), torch.randint(C, (200,))
    temperature = m.fit_temperature(logits, target)
    metric = m.CalibrationError(temperature=temperature)
    metric.update(logits, target)
    assert metric.compute() == m.temperature_scaled_ece(logits, target, temperature)

    half, whole = m.CalibrationError(temperature=0.01), m.CalibrationError(temperature=0.01)
    overflowing = torch.tensor([[1000.0, 999.0], [-1000.0, 1000.0]])  # 1000 / 0.01 is beyond float16
    half.update(overflowing.half(), torch.tensor([0, 0]))
    whole.update(overflowing, torch.tensor([0, 0]))
    assert half.compute() == whole.compute() == 0.5

    broken = m.CalibrationError(temperature=m.fit_temperature(torch.full((2, 3), torch.nan), torch.tensor([0, 1])))
    broken.update(logits, target)
    assert broken.compute().isnan()


@pytest.mark.parametrize(
    ("logit_of_miss", "risk", "coverage"),
    [(1.0, 0.0, 0.5), (1.0, 0.2, 0.5), (1.0, 0.25, 1.0), (0.9, 0.0, 0.75), (1.1, 0.2, 0.5), (1.1, 1.0, 1.0)],
)
def test_coverage_at_risk_keeps_whole_ties(logit_of_miss, risk, coverage):
    """Two sure hits, then a hit and a miss; where these are tied, only both or none of them can be kept."""
    metric = m.CoverageAtRisk(risk=risk)
    metric.update(torch.tensor([[4.0, 0.0], [logit_of_miss, 0.0], [4.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 0, 0]))
    assert metric.compute() == coverage


def test_coverage_at_risk_is_none_when_the_surest_are_wrong():
    metric = m.CoverageAtRisk(risk=0.4)
    metric.update(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert metric.compute() == 0
    assert metric.higher_is_better


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.FPR95(positive="in"), "unknown positive class 'in'"),
        (lambda: m.CalibrationError(n_bins=0), "n_bins must be at least 1"),
        (lambda: m.CalibrationError(norm="l3"), "unknown norm 'l3'"),
        (lambda: m.CalibrationError(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: m.MaximumCalibrationError(temperature=-1.0), "temperature must be positive"),
        (lambda: m.CoverageAtRisk(risk=1.5), r"risk is an error rate in \[0, 1\], got 1.5"),
        (lambda: m.CoverageAtRisk(risk=float("nan")), "risk is an error rate"),
        (lambda: m.AdaptiveCalibrationError(n_bins=-1), "n_bins must be at least 1"),
        (lambda: m.AdaptiveCalibrationError(norm="x"), "unknown norm"),
        (lambda: m.ClasswiseCalibrationError(num_classes=0), "at least 1"),
        (lambda: m.ClasswiseCalibrationError(num_classes=3).update(torch.zeros(2, 4), torch.zeros(2)), r"\[n, 3\]"),
        (lambda: m.FPR95().update(torch.zeros(2), torch.ones(3).bool()), "same n"),
        (lambda: m.BrierScore().update(torch.zeros(2, 3), torch.tensor([0, 3])), r"targets must lie in \[-1, 3\)"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
