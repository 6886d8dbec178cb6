"""The streamed class-wise error against the one of all probabilities, and its standard error against the bootstrap's."""

import numpy as np
import pytest
import torch
from scipy.stats import sem

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError

C = 6


def batch(n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, C, generator=generator)
    target = torch.multinomial((0.6 * logits).softmax(-1), 1, generator=generator).squeeze(1)
    return torch.randperm(n, generator=generator), logits, target


def test_values_with_and_without_each_group():
    index, logits, target = batch(230, 0)
    metric = m.ClasswiseJackknife(C, n_bins=8, n_groups=7)
    for part in (slice(0, 100), slice(100, 101), slice(101, 230)):
        metric.update(index[part], logits[part], target[part])
    probs = logits.softmax(-1)
    expected = [m.classwise_ece(probs, target, 8)]
    expected += [m.classwise_ece(probs[index % 7 != g], target[index % 7 != g], 8) for g in range(7)]
    torch.testing.assert_close(metric.compute(), torch.stack(expected), atol=1e-12, rtol=0)


def test_standard_error_is_the_bootstrap_s():
    index, logits, target = batch(3000, 1)
    metric = m.ClasswiseJackknife(C, n_groups=60)
    metric.update(index, logits, target)
    probs = logits.softmax(-1)
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(3000, (3000,), generator=generator) for _ in range(200)]
    spread = torch.stack([m.classwise_ece(probs[i], target[i]) for i in drawn]).std()
    assert float(m.jackknife_standard_error(metric.compute()[1:])) == pytest.approx(float(spread), rel=0.35)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.rand(40, dtype=torch.float64)
    left_out = (values.sum() - values) / 39
    assert float(m.jackknife_standard_error(left_out)) == pytest.approx(sem(values.numpy()))
    undefined = torch.cat([left_out, torch.tensor([torch.nan])])
    assert float(m.jackknife_standard_error(undefined)) == pytest.approx(sem(values.numpy()))


def test_few_samples_broken_ones_and_those_without_a_class():
    metric = m.ClasswiseJackknife(C)
    assert metric.compute().isnan().all()
    index, logits, target = batch(1, 3)
    metric.update(index, logits, target)
    value, *left_out = metric.compute()
    assert float(value) == pytest.approx(float(m.classwise_ece(logits.softmax(-1), target)))
    assert sum(np.isnan(left_out)) == 1
    metric.update(index + 1, logits * torch.nan, target - target - 1)  # without a class: it changes nothing
    assert metric.compute()[0] == value
    metric.update(index + 1, logits * torch.nan, target)
    assert metric.compute()[0].isnan()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.ClasswiseJackknife(0), "num_classes"),
        (lambda: m.ClasswiseJackknife(3, n_groups=1), "n_groups"),
        (
            lambda: m.ClasswiseJackknife(3).update(torch.arange(2), torch.zeros(2, 4), torch.zeros(2).long()),
            r"\[n, 3\]",
        ),
        (lambda: m.ClasswiseJackknife(3).update(torch.arange(1), torch.zeros(2, 3), torch.zeros(2).long()), "index"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
