"""What training was worth: counted against a plain loop over made-up runs, and what a store without trained runs says."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from cases.store import KEY, make_curves, make_rows, make_samples
from cases.study import grid, write_study

from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.training import training_worth, worth_by_setting
from lightning_vlmq.study.report.improvement import training_table

METHODS = ("minmax", "gptq", "lsq_contrastive", "ste_feature")


@pytest.fixture(params=range(3))
def made(request, tmp_path):
    """A store of random losses and divergences, some missing, and the same numbers by key."""
    rng = np.random.default_rng(request.param)
    store, known = ResultsStore(tmp_path), {}
    store.write("full", make_rows("full", ("top1",), FULL), make_samples(), make_curves(), 0.0)
    for number, (model, bits, scope, method, seed) in enumerate(
        (m, b, s, k, seed)
        for m in "ab"
        for b in (8, 4)
        for s in ("vision", "vision_text")
        for k in METHODS
        for seed in (0, 1)
    ):
        if rng.random() < 0.15:
            continue
        key = replace(KEY, model=model, weight_bits=bits, scope=scope, method=method, seed=seed)
        values = {"kl": rng.random()}
        if method in METHODS[2:] and rng.random() < 0.9:
            start = rng.random()
            values |= {"held_out_loss_start": start, "held_out_loss": start * min(rng.uniform(0.5, 1.5), 1.0)}
        known[key] = values
        for tuned in (False, True):  # a tuned logit scale has numbers of its own, which do not count
            told = dict.fromkeys(values, 7.0) if tuned else values
            run, own = f"r{number}{'.lst' * tuned}", replace(key, is_tuned=tuned)
            rows = make_rows(run, tuple(told), own).assign(value=list(told.values()))
            store.write(run, rows, make_samples(), make_curves(), 0.0)
    return store, known


FULL = replace(KEY, method="fp32", scope="none", weight_bits=32, act_bits=32)


def test_counts_are_those_of_a_loop(made):
    store, known = made
    found = worth_by_setting(StudyResults.load(store.root))
    assert list(found) == [(b, 8, s) for b in (8, 4) for s in ("vision", "vision_text")]
    for (bits, _, scope), worth in found.items():
        trained = {k: v for k, v in known.items() if "held_out_loss" in v and (k.weight_bits, k.scope) == (bits, scope)}
        ratios = [v["held_out_loss"] / v["held_out_loss_start"] for v in trained.values()]
        assert worth.trained == len(trained) and worth.lowered == sum(r < 1 for r in ratios)
        assert worth.ratios == pytest.approx((min(ratios), np.median(ratios), max(ratios)))
        for name in METHODS[:2]:
            beside = [(v["kl"], known[o]["kl"]) for k, v in trained.items() if (o := replace(k, method=name)) in known]
            assert worth.below[name] == (sum(one < other for one, other in beside), len(beside))


def test_without_training_there_is_nothing(tmp_path):
    write_study(tmp_path, grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"]), size=0.05)
    results = StudyResults.load(tmp_path)
    assert worth_by_setting(results) == {} and training_table(analyse(results)) == ""
    assert (
        training_worth(
            pd.DataFrame(
                {"method": ["lsq_feature"], "held_out_loss": [np.nan], "held_out_loss_start": [1.0], "kl": [1.0]}
            )
        )
        is None
    )


def test_the_report_shows_it(made):
    results = StudyResults.load(made[0].root)
    table, worth = training_table(analyse(results)), worth_by_setting(results)
    assert "W4A8 vision_text" in table and all(f"<td>{w.lowered}</td>" in table for w in worth.values())
