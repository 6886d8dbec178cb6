"""Fronts, spreads over seeds, and damage: against what can be said by hand."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cases.study import grid, write_study

from lightning_vlmq.evaluation.about import BITS_PER_WEIGHT, OUTPUT_SQNR
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.tradeoffs import damage, pareto_front, seed_spread, undominated
from lightning_vlmq.study.report.figures.damage import effects_over_damage
from lightning_vlmq.study.report.sections import sections


def test_the_front_by_comparing_every_pair():
    goods = np.random.default_rng(0).integers(0, 4, (40, 4)).astype(float)
    wanted = [
        not any(all(b >= a for a, b in zip(one, other)) and any(b > a for a, b in zip(one, other)) for other in goods)
        for one in goods
    ]
    assert undominated(goods).tolist() == wanted and 0 < sum(wanted) < 40
    assert undominated(np.ones((3, 4))).all() and undominated(np.empty((0, 4))).shape == (0,)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    keys = [
        *grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision"]),
        *grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], 1),
    ]
    store = write_study(root / "bare", keys, size=0.1)
    told = ResultsStore(root / "told")
    for run_id in store.run_ids():  # the same with what a real run says of its model
        rows = store.rows([run_id])
        one, bits = rows.iloc[0].to_dict(), int(rows["weight_bits"].iloc[0])
        about = {OUTPUT_SQNR: 3.0 * bits, BITS_PER_WEIGHT: bits + 0.5} if bits < 32 else {}
        more = [
            one | {"metric": m, "value": v, "dataset": "concepts", "role": "id", "score": ""} for m, v in about.items()
        ]
        table = pd.concat([rows, pd.DataFrame(more, columns=rows.columns)]) if more else rows
        told.write(run_id, table, store.samples(run_id), store.curves(run_id), statistics=store.statistics(run_id))
    return analyse(StudyResults.load(root / "told"))


def test_damage_is_by_vlm_and_setting(analysis):
    assert {s.weight_bits: db for (_, s), db in damage(analysis).items()} == {8: 24.0, 4: 12.0}
    figure = effects_over_damage(analysis)
    drawn = [
        x for axis in figure.axes for line in axis.lines for x in np.atleast_1d(line.get_xdata()) if len(axis.lines) > 1
    ]
    assert {12.0, 24.0} <= set(map(float, drawn))


def test_spread_over_seeds_by_pandas(analysis):
    (top1,) = (s for s in seed_spread(analysis) if s.dimension.measure == Measure("top1", "id"))
    rows = analysis.results.rows.query("metric == 'top1' and role == 'id' and dataset == '' and weight_bits == 4")
    assert top1.over_seeds == pytest.approx(rows["value"].std(ddof=1)) and top1.kind == "post-training"
    assert top1.over_samples == pytest.approx((rows["stderr"] ** 2).mean() ** 0.5) and (top1.n_pairs, top1.n_seeds) == (
        1,
        2,
    )


def test_fronts_hold_full_precision_and_the_smallest(analysis):
    front = pareto_front(analysis)["vit_clean"]
    assert [c.bits for c in front] == sorted((c.bits for c in front), reverse=True) and front[-1].bits == 4.5
    for one, other in itertools.permutations(front, 2):
        assert not all(b >= a for a, b in zip(one.goods, other.goods))
    (body,) = (body for anchor, _, body in sections(analysis) if anchor == "damage")
    assert "Pareto fronts" in body and "Seeds beside test images" in body and "bits a weight" in body


def test_nothing_is_drawn_of_stores_without_these_numbers():
    empty = SimpleNamespace(
        results=SimpleNamespace(about=lambda *_: pd.DataFrame({"run_id": [], "value": []}), runs=())
    )
    assert damage(empty) == {}
