"""Which of a study's runs count, and how their samples are laid side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from cases.study import grid, make_run, write_study

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import Statistics
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults, align
from lightning_vlmq.study.analysis.setting import Setting

W4 = Setting("minmax", 4, 8, "vision")
KEYS = grid(methods=["minmax"], bits=[(4, 8)], scopes=["vision"])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ResultsStore:
    return write_study(tmp_path_factory.mktemp("study"), KEYS, size=0.1)


def test_other_samples_than_full_precision_s_are_refused(tmp_path):
    store = ResultsStore(tmp_path)
    for key in KEYS[:2]:
        rows, samples, curves = make_run(key, key.method, size=0.05)
        store.write(key.method, rows, samples[samples["index"] > 0] if key.method == "minmax" else samples, curves)
    with pytest.raises(VLMQError, match="run 'minmax' has other samples of"):
        analyse(StudyResults.load(tmp_path))


def test_the_newest_run_of_a_key_counts(tmp_path):
    store = ResultsStore(tmp_path)
    for run_id, size in (("z-old", 0.05), ("a-new", 0.1)):
        for key in KEYS[:2]:
            store.write(f"{run_id}-{key.method}", *make_run(key, f"{run_id}-{key.method}", size))
    results = StudyResults.load(tmp_path)
    assert [run.run_id for run in results.runs] == ["a-new-fp32", "a-new-minmax"] and results.superseded == 2
    assert set(results.rows["run_id"]) == {"a-new-fp32", "a-new-minmax"}


def test_samples_come_sorted_and_split_by_data_set(store):
    run = StudyResults.load(store.root).runs[0]
    expected = store.samples(run.run_id)
    sets = run.samples()
    assert sum(len(columns["index"]) for columns in sets.values()) == len(expected)
    for where, columns in sets.items():
        mine = expected[(expected["dataset"] == where.dataset) & (expected["role"] == where.role)].sort_values("index")
        for name in ("index", "prediction", "energy"):
            np.testing.assert_array_equal(columns[name], mine[name])


def test_unsorted_samples_are_aligned(tmp_path):
    store = ResultsStore(tmp_path)
    for key in KEYS[:2]:
        rows, samples, curves = make_run(key, key.method, size=0.05, settings=Statistics())
        store.write(key.method, rows, samples.sample(frac=1, random_state=len(key.method)), curves)
    shuffled = analyse(StudyResults.load(tmp_path))
    ordered = analyse(
        StudyResults.load(write_study(tmp_path / "ordered", KEYS[:2], size=0.05, settings=Statistics()).root)
    )
    keys = ["method", "role", "dataset", "score", "metric"]
    tables = (analysis.comparisons.table().sort_values(keys, ignore_index=True) for analysis in (shuffled, ordered))
    pd.testing.assert_frame_equal(*tables)


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(VLMQError, match=r"no results in .*run the study first"):
        StudyResults.load(tmp_path / "nothing")


def test_align_keeps_runs_without_samples_undefined(tmp_path):
    store = ResultsStore(tmp_path)
    rows, samples, curves = make_run(KEYS[0], "full", size=0.05)
    store.write("full", rows, samples, curves)
    rows, _, curves = make_run(KEYS[1], "bare", size=0.05)
    store.write("bare", rows, pd.DataFrame(), curves)
    matrix = align(list(StudyResults.load(tmp_path).runs))["id"][0]
    assert np.isnan(matrix["correct"][:, 1]).all() and not np.isnan(matrix["correct"][:, 0]).any()


def test_runs_of_other_settings_are_not_compared(tmp_path):
    store = ResultsStore(tmp_path)
    for key, settings in zip(KEYS[:2], (Statistics(), Statistics(n_bins=10))):
        store.write(key.method, *make_run(key, key.method, size=0.05), statistics=settings)
    with pytest.raises(VLMQError, match="different statistics"):
        analyse(StudyResults.load(tmp_path))


def test_a_seed_without_full_precision_takes_another_seed_s(tmp_path):
    keys = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"])
    quantized_again = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], seed=1)[1]
    write_study(tmp_path, [*keys, quantized_again], size=0.05)
    assert analyse(StudyResults.load(tmp_path)).comparisons["vit_clean", W4, Measure("top1", "id")].n_seeds == 2


def test_vlms_without_full_precision_are_named_not_compared(tmp_path):
    write_study(tmp_path, [key for key in KEYS if key.method != "fp32" or key.model == "vit_clean"], size=0.05)
    analysis = analyse(StudyResults.load(tmp_path))
    assert analysis.unreferenced == ["convnext_noisy"] and analysis.vlms == ["vit_clean"]
    assert {vlm for vlm, _, _ in analysis.comparisons} == {"vit_clean"}
