"""The table of shared-out bits: a line per setting with what the store says, between its markers alone."""

import importlib.util
import sys
from pathlib import Path

import pytest
from cases.study import grid, write_study

from lightning_vlmq.evaluation.measures import dimensions
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.groups import Cell, by_vlm
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.notation import percent_interval

REPOSITORY = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("mixed_table", REPOSITORY / "scripts" / "make_mixed_table.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
KEYS = grid(["vit_clean", "convnext_noisy"], ["minmax", "spectral_mixed"], [(8, 8), (4, 8)], ["vision_text"])


def test_a_line_for_each_setting_with_the_means_of_its_cells(tmp_path):
    root, page = tmp_path / "mixed", tmp_path / "mechanism.md"
    write_study(root, KEYS, size=0.05)
    page.write_text((REPOSITORY / "docs" / "mechanism.md").read_text())
    before, after = page.read_text().split("<!-- mixed -->")[0], page.read_text().split("<!-- end of mixed -->")[1]
    script.write(root, page)
    text = page.read_text()
    assert text.startswith(before) and text.endswith(after)
    lines = [line for line in text.split("<!-- mixed -->")[1].split("\n") if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines] == [
        f"`{method}` {bits}" for bits in ("W8A8", "W4A8") for method in ("minmax", "spectral_mixed")
    ]
    analysis = analyse(StudyResults.load(root))
    first = dimensions(analysis.score)[0]
    own: dict[str, list[Cell]] = {}
    for vlm, setting, comparison in analysis.comparisons.of(first.measure):
        if (setting.method, setting.weight_bits) == ("spectral_mixed", 4):
            own[vlm] = [Cell.of(first.measure, comparison, "effect")]
    mean = by_vlm(own)
    assert " ".join(percent_interval(mean.estimate, mean.low, mean.high)) in lines[3].split("|")[3]


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Nothing\n")
    monkeypatch.setattr(sys, "argv", ["make_mixed_table", str(tmp_path / "nothing"), str(page)])
    with pytest.raises(SystemExit) as left:
        script.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "no place for mixed" in said
