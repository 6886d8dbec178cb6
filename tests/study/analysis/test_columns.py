"""Comparisons held as columns are those that went in; changes of measures that another one is tested for come from that one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import Interval, p_values
from lightning_vlmq.study.analysis.change import FULL, Comparison
from lightning_vlmq.study.analysis.columns import Comparisons
from lightning_vlmq.study.analysis.setting import Setting

W4, W8 = (Setting("minmax", bits, 8, "vision") for bits in (4, 8))
TOP1, ECE, DEBIASED = Measure("top1", "id"), Measure("ece", "id"), Measure("ece_debiased", "id")


def made(rng, is_full, draws=0):
    value, reference = rng.uniform(0.2, 0.8, 2)
    if is_full:
        return Comparison(value, 0.01, value, 1)
    change, effect = (Interval.normal(*rng.uniform(0.01, 0.1, 2)) for _ in range(2))
    return Comparison(value, 0.01, reference, 2, change, effect, change.p_value, effects=rng.normal(size=draws))


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    keys = [(vlm, setting, m) for vlm in ("b", "a") for setting in (FULL, W8, W4) for m in (TOP1, ECE, DEBIASED)]
    return {key: made(rng, key[1] == FULL, 5) for key in keys if key != ("a", W4, DEBIASED)}


def same(a, b):
    for name in ("value", "stderr", "reference", "n_seeds", "p_value", "q_value"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), nan_ok=True)
    for one, other in ((a.change, b.change), (a.effect, b.effect)):
        assert (one is None) == (other is None) and (one is None or one == pytest.approx(other, nan_ok=True))
    np.testing.assert_array_equal(a.effects, b.effects)


def test_what_goes_in_comes_out(given):
    found = Comparisons.gathered(given)
    assert list(found) == list(given) and len(found) == len(given)
    for key, comparison in found.items():
        same(comparison, given[key])
    assert found["b", W4, TOP1] is found["b", W4, TOP1]
    for absent in (("a", W4, DEBIASED), ("c", W4, TOP1), ("a", W4.tuned, TOP1)):
        assert absent not in found and found.get(absent) is None
    assert found.measures == [TOP1, ECE, DEBIASED]
    assert [(vlm, setting) for vlm, setting, _ in found.of(ECE)] == [("b", W8), ("b", W4), ("a", W8), ("a", W4)]
    assert found.cells([W4, W8]) == 4 and found.cells([W4]) == 2
    assert len(Comparisons.gathered({})) == 0 and not Comparisons.gathered({}).measures


def test_tests_are_corrected_once_and_stand_for_others(given):
    found = Comparisons.gathered(given).corrected().with_tested_changes()
    own = {key: c for key, c in given.items() if key[2] != ECE and c.change is not None}
    adjusted = dict(zip(own, false_discovery_control([c.p_value for c in own.values()])))
    for key, q_value in adjusted.items():
        assert found[key].q_value == pytest.approx(q_value)
        same(Comparison(**{**vars(found[key]), "q_value": given[key].q_value}), given[key])
    twin, ece = found["b", W8, DEBIASED], found["b", W8, ECE]
    assert ece.change == twin.change and (ece.p_value, ece.q_value) == (twin.p_value, twin.q_value)
    full = given["b", W8, ECE].reference
    assert ece.effect == pytest.approx(Interval.normal(-twin.change.estimate / full, twin.change.stderr / full))
    np.testing.assert_allclose(ece.effects, -twin.effects / full)
    alone = found["a", W4, ECE]  # nothing stands for it
    assert alone.change.estimate == given["a", W4, ECE].change.estimate
    assert np.isnan([alone.change.stderr, alone.effect.stderr, alone.p_value, alone.q_value]).all()


def test_the_table_has_every_number(given):
    found = Comparisons.gathered(given)
    table = found.table()
    assert list(zip(table["vlm"], table["method"], table["weight_bits"], table["metric"])) == [
        (vlm, s.method, s.weight_bits, m.metric) for vlm, s, m in given
    ]
    changes = [np.nan if c.change is None else c.change.high for c in given.values()]
    np.testing.assert_allclose(table["change_high"], changes)
    assert (table.loc[table["metric"] == "ece", "tested_by"] == "ece_debiased").all()


def test_p_values_of_many_are_those_of_each():
    estimate, stderr = np.array([0.3, -0.3, 0.0, 0.0, 1.0, np.nan, 0.1]), np.array([0.1, 0.1, 0.1, 0, 0, 1, np.nan])
    expected = [2 * norm.sf(3), 2 * norm.sf(3), 1.0, 1.0, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(p_values(estimate, stderr), expected)
    np.testing.assert_array_equal(
        [Interval.normal(*pair).p_value for pair in zip(estimate, stderr)], p_values(estimate, stderr)
    )
