import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError


def calibrated(n, seed, scale=1.0):
    """Logits whose softmax is the true class distribution, times ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return scale * logits, target


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_fit_is_scipys_minimum(scale):
    logits, target = calibrated(400, 1, scale)
    x, y = logits.double().numpy(), target.numpy()

    def nll(log_t):
        return -log_softmax(x / np.exp(log_t), axis=1)[np.arange(400), y].mean()

    best = minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    assert np.log(m.fit_temperature(logits, target)) == pytest.approx(best.x, abs=1e-5)


def test_fit_recovers_the_scale_and_calibrates():
    logits, target = calibrated(8000, 2, scale=4.0)
    temperature = m.fit_temperature(logits[:4000], target[:4000])
    assert temperature == pytest.approx(4.0, rel=0.1)
    rest, labels = logits[4000:], target[4000:]
    before, after = (m.temperature_scaled_ece(rest, labels, t) for t in (1.0, temperature))
    assert before > 0.1 and after < 0.03
    rows = m.per_sample(rest, labels)
    assert before == m.calibration_error(rows["confidence"], rows["correct"])
    assert m.temperature_scaled_ece(rest, labels, temperature, binning="mass") < 0.03


def test_fit_without_a_finite_optimum():
    sure = 10 * torch.eye(3)
    assert m.fit_temperature(sure, torch.arange(3)) < 1  # all right: the sharper the better
    assert m.fit_temperature(sure, (torch.arange(3) + 1) % 3) > 50  # all wrong: the flatter the better
    assert m.fit_temperature(torch.zeros(4, 3), torch.zeros(4).long()) == 1.0
    assert m.fit_temperature(torch.zeros(4, 1), torch.zeros(4).long()) == 1.0
    assert np.isnan(m.fit_temperature(torch.tensor([[torch.nan, 0.0]]), torch.tensor([0])))


def test_a_low_temperature_does_not_overflow_half_precision():
    logits = torch.tensor([[1000.0, 999.0], [-1000.0, 1000.0]])  # 1000 / 0.01 is beyond float16
    for kind in (torch.float32, torch.float16):
        assert m.temperature_scaled_ece(logits.to(kind), torch.tensor([0, 0]), 0.01) == 0.5


def test_an_undefined_temperature_shows():
    broken = m.fit_temperature(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    assert m.temperature_scaled_ece(*calibrated(20, 4), broken).isnan()


def test_fit_works_inside_no_grad_and_is_repeatable():
    logits, target = calibrated(50, 3, 2.0)
    with torch.no_grad():
        inside = m.fit_temperature(logits, target)
    assert inside == m.fit_temperature(logits, target)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.fit_temperature(torch.zeros(0, 3), torch.zeros(0).long()), "n > 0"),
        (lambda: m.fit_temperature(torch.zeros(2, 3), torch.tensor([0, -1])), "without a class"),
        (lambda: m.fit_temperature(torch.zeros(2, 3), torch.tensor([0])), "need logits"),
        (lambda: m.temperature_scaled_ece(torch.zeros(2, 3), torch.tensor([0, 1]), 0.0), "positive"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
