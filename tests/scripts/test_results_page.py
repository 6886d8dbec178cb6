"""The page of results says what the store holds; the rows beside it are a store that a study goes on from."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from cases.study import grid, write_study
from PIL import Image

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis import runs as runs_module
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.published import held_against
from lightning_vlmq.study.analysis.runs import StudyResults, needed_rows

REPOSITORY = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("results_page", REPOSITORY / "scripts" / "make_results_page.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
KEYS = grid(["vit_clean", "convnext_noisy"], ["minmax"], [(8, 8), (4, 8)], ["vision_text"], tuned=True)


def test_page_figures_and_rows(tmp_path, monkeypatch):
    root, page = tmp_path / "logs" / "embedded", tmp_path / "docs" / "results.md"
    store = write_study(root, KEYS, size=0.05)
    page.parent.mkdir()
    page.write_text((REPOSITORY / "docs" / "results.md").read_text())
    script.write(root, page)
    text, analysis = page.read_text(), analyse(StudyResults.load(root))
    claims = held_against(analysis)
    assert len(claims) > 5 and all(f"| {c.claim} |" in text and f"**{c.verdict}**" in text for c in claims)
    assert f"{analysis.results.evaluations:,} evaluation runs" in text and "W4A8" in text
    assert "by version `0.1.0`;" in text
    for name in ("overview", "spurious"):
        assert f"images/results_{name}.png" in text
        Image.open(page.parent / "images" / f"results_{name}.png").verify()
    shutil.copytree(page.parent / "data" / "embedded", tmp_path / "again")
    kept = ResultsStore(tmp_path / "again")
    assert kept.run_ids() == store.run_ids() and all(map(kept.has, kept.run_ids()))
    order = ["run_id", "dataset", "role", "score", "metric"]
    ours, theirs = (s.table(s.run_ids(), [*order, "value", "stderr"], needed_rows()).to_pandas() for s in (kept, store))
    assert len(ours) == kept.n_rows(kept.run_ids()) < store.n_rows(store.run_ids())
    frames = [f.astype(dict.fromkeys(order, str)).sort_values(order, ignore_index=True) for f in (ours, theirs)]
    pd.testing.assert_frame_equal(*frames, rtol=2**-24, atol=0.0, check_exact=False)
    assert [kept.facts(run_id) for run_id in kept.run_ids()] == [store.facts(run_id) for run_id in store.run_ids()]
    for limit in ("MANY_RUNS", "MANY_OF_ONE_VLM"):
        monkeypatch.setattr(runs_module, limit, 0)
    found, wanted = (held_against(analyse(StudyResults.load(s.root))) for s in (kept, store))
    assert [c.verdict for c in found] == [c.verdict for c in wanted]
    for one, other in zip(found, wanted):
        assert one.found.estimate == pytest.approx(other.found.estimate, rel=1e-5, abs=1e-7, nan_ok=True)
    monkeypatch.undo()
    script.write(root, page)
    assert page.read_text() == text  # again: the same page


@pytest.mark.parametrize("text", ["# Results\n", None])
def test_what_is_missing_is_said(tmp_path, text, monkeypatch, capsys):
    page = tmp_path / "results.md"
    page.write_text((REPOSITORY / "docs" / "results.md").read_text() if text is None else text)
    monkeypatch.setattr(sys, "argv", ["make_results_page", str(tmp_path / "nothing"), str(page)])
    with pytest.raises(SystemExit) as left:
        script.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "make_results_page: error" in said


def test_rows_that_are_too_many_change_nothing(tmp_path, monkeypatch):
    root, kept = tmp_path / "logs", tmp_path / "data"
    write_study(root, KEYS[:2], size=0.05)
    kept.mkdir()
    (kept / "here").touch()
    monkeypatch.setattr(script, "MOST_BYTES", 100.0)
    with pytest.raises(VLMQError, match="keep a beginning"):
        script.keep_rows(StudyResults.load(root), kept)
    assert [path.name for path in tmp_path.iterdir() if path != root] == ["data"] and (kept / "here").exists()
