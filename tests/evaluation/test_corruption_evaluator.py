"""Mean corruption error in the evaluation: rows against the definition, suites, baselines, standard errors."""

import numpy as np
import pytest
import torch
from cases.evaluation import rows as rows_from

from lightning_vlmq.data import EvalSet, TensorImages
from lightning_vlmq.evaluation.evaluators import CorruptionEvaluator, default_evaluators
from lightning_vlmq.metrics import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS

N = 200
CORRUPTIONS, SEVERITIES = ("fog", "gaussian_noise", "contrast"), (1, 3, 5)


def corrupted(corruption, severity, n=N, prefix=""):
    images = TensorImages(torch.zeros(n, 3, 1, 1, dtype=torch.uint8))
    return EvalSet(f"{prefix}{corruption}_{severity}", "corruption", images, corruption, severity, group=f"{prefix}c")


def clean(n=N, role="corruption", prefix=""):
    return EvalSet("clean", role, TensorImages(torch.zeros(n, 3, 1, 1, dtype=torch.uint8)), group=f"{prefix}c")


def records(sets, error):
    return {
        s.name: {
            "index": torch.arange(len(s.images)),
            "target": torch.zeros(len(s.images), dtype=torch.int64),
            "correct": torch.rand(len(s.images)) > error,
        }
        for s in sets
    }


@pytest.fixture
def sets():
    return [clean(), *(corrupted(c, s) for c in CORRUPTIONS for s in SEVERITIES)]


def error(found, name):
    return 1 - found[name]["correct"].double().mean().item()


def expected(mine, base, relative):
    """The definition, a corruption at a time."""
    less = (error(mine, "clean"), error(base, "clean")) if relative else (0, 0)
    terms = []
    for c in CORRUPTIONS:
        above = sum(error(mine, f"{c}_{s}") - less[0] for s in SEVERITIES)
        terms.append(above / sum(error(base, f"{c}_{s}") - less[1] for s in SEVERITIES))
    return sum(terms) / len(terms)


def test_rows_are_the_definition_with_full_precision_as_baseline(sets):
    mine, base = records(sets, 0.4), records(sets, 0.3)
    mine["clean"]["correct"], base["clean"]["correct"] = torch.rand(N) > 0.2, torch.rand(N) > 0.1
    rows = {r.metric: r for r in rows_from(CorruptionEvaluator(), sets, mine, base)}
    assert rows.keys() == {"mean_corruption_error", "relative_mean_corruption_error"}
    assert rows["mean_corruption_error"].value == pytest.approx(expected(mine, base, False))
    assert rows["relative_mean_corruption_error"].value == pytest.approx(expected(mine, base, True))
    for row in rows.values():
        assert (row.dataset, row.role, row.n) == ("corruptions", "corruption", 9 * N)
        assert 0 < row.stderr < 0.5


def test_standard_error_is_that_of_new_samples(sets):
    """The spread over resamples matches the spread over fresh samples of the same size."""
    drawn = [rows_from(CorruptionEvaluator(), sets, records(sets, 0.4), records(sets, 0.3))[0] for _ in range(60)]
    spread = np.std([row.value for row in drawn], ddof=1)
    assert np.mean([row.stderr for row in drawn]) == pytest.approx(spread, rel=0.4)


def test_the_model_itself_as_baseline_is_one_without_doubt(sets):
    mine = records(sets, 0.4)
    mine["clean"]["correct"] = torch.rand(N) > 0.1
    for row in rows_from(CorruptionEvaluator(), sets, mine, mine):
        assert row.value == pytest.approx(1) and row.stderr == pytest.approx(0, abs=1e-12)


def test_full_precision_has_rows_only_against_published_errors(sets):
    mine = records(sets, 0.4)
    assert rows_from(CorruptionEvaluator(), sets, mine, None) == []
    rows = {r.metric: r for r in rows_from(CorruptionEvaluator("alexnet"), sets, mine, None)}
    assert rows.keys() == {"mean_corruption_error_alexnet", "relative_mean_corruption_error_alexnet"}
    terms, relative = [], []
    for c in CORRUPTIONS:
        mean = np.mean([error(mine, f"{c}_{s}") for s in SEVERITIES])
        terms.append(mean / ALEXNET_ERRORS[c])
        relative.append((mean - error(mine, "clean")) / (ALEXNET_ERRORS[c] - ALEXNET_CLEAN_ERROR))
    assert rows["mean_corruption_error_alexnet"].value == pytest.approx(np.mean(terms))
    assert rows["relative_mean_corruption_error_alexnet"].value == pytest.approx(np.mean(relative))


def test_suites_are_kept_apart_and_incomplete_severities_left_out():
    sets = [clean(70)]
    sets += [corrupted("fog", s, prefix="imagenet_c_") for s in (1, 2)] + [corrupted("snow", 2, prefix="imagenet_c_")]
    sets += [corrupted("fog", s, 50, "cifar10_c_") for s in (1, 2)] + [corrupted("speckle_noise", 1, 50, "cifar10_c_")]
    sets += [corrupted("fog", 3, prefix="x_"), corrupted("snow", 4, prefix="x_")]  # no severity in common
    mine, base = records(sets, 0.5), records(sets, 0.4)
    rows = {
        r.dataset: r for r in rows_from(CorruptionEvaluator(), sets, mine, base) if r.metric == "mean_corruption_error"
    }
    assert {name: row.n for name, row in rows.items()} == {"imagenet_c": 2 * N, "cifar10_c": 100}
    ratios = [error(mine, f"imagenet_c_{c}_2") / error(base, f"imagenet_c_{c}_2") for c in ("fog", "snow")]
    assert rows["imagenet_c"].value == pytest.approx(np.mean(ratios))
    published = {r.dataset: r for r in rows_from(CorruptionEvaluator("alexnet"), sets, mine, None)}
    assert published["cifar10_c"].n == 100  # speckle noise, which AlexNet's table lacks, does not count: fog 1 and 2


def test_nothing_to_say_without_corrupted_sets_and_no_relative_error_without_originals(sets):
    mine = records(sets, 0.4)
    assert rows_from(CorruptionEvaluator(), sets[:1], mine, mine) == []
    assert {r.metric for r in rows_from(CorruptionEvaluator(), sets[1:], mine, mine)} == {"mean_corruption_error"}
    other = [clean(prefix="of other images "), *sets[1:]]
    assert {r.metric for r in rows_from(CorruptionEvaluator(), other, mine, mine)} == {"mean_corruption_error"}
    assert any(isinstance(e, CorruptionEvaluator) for e in default_evaluators())


def test_the_id_set_of_the_same_images_is_the_original(sets):
    mine, base = records(sets, 0.4), records(sets, 0.3)
    mine["clean"]["correct"], base["clean"]["correct"] = torch.rand(N) > 0.2, torch.rand(N) > 0.1
    values = [
        {r.metric: r.value for r in rows_from(CorruptionEvaluator(), [original, *sets[1:]], mine, base)}
        for original in (sets[0], clean(role="id"))
    ]
    assert values[0] == values[1] and len(values[0]) == 2
    mine["clean"]["target"] = base["clean"]["target"] = torch.arange(N)  # other images: not the original
    assert len(rows_from(CorruptionEvaluator(), [clean(role="id"), *sets[1:]], mine, base)) == 1


def test_a_loss_that_cannot_be_told_from_zero_divides_nothing(sets, caplog):
    """Full precision loses nothing by one corruption: the relative error is undefined, and one line says so."""
    mine, base = records(sets, 0.4), records(sets, 0.3)
    for severity in SEVERITIES:
        base[f"fog_{severity}"]["correct"] = base["clean"]["correct"].clone()
    rows = {r.metric: r for r in rows_from(CorruptionEvaluator(), sets, mine, base)}
    assert np.isnan(rows["relative_mean_corruption_error"].value)
    assert 0 < rows["mean_corruption_error"].value < 3
    (line,) = (record.getMessage() for record in caplog.records)
    assert "relative_mean_corruption_error of corruptions is undefined" in line and "fog" in line
    for s in sets:  # nothing is ever wrong: no error at all to divide by
        base[s.name]["correct"] = torch.ones(N, dtype=torch.bool)
    assert all(np.isnan(r.value) and np.isnan(r.stderr) for r in rows_from(CorruptionEvaluator(), sets, mine, base))
