"""``vlmq compare`` and ``vlmq card`` on runs of the real command line."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cases.small_data import SMALL_DATA
from cases.study import grid, write_study
from scipy.stats import norm

from lightning_vlmq.cli import main
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore

SMALL = [
    *(f"--data.{key}={value}" for key, value in SMALL_DATA.items()),
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with full precision and W3A8, the latter's model saved beside it, and a run on other samples."""
    root = tmp_path_factory.mktemp("card")
    start = ["validate", "--config=eval", f"--results.root={root}", *SMALL]
    main([*start, "--results.run_id=full", "--model.lst=false"])
    quantized = ["--model.quant.method=minmax", "--model.quant.weight_bits=3", "--model.lst=false"]
    writer = [
        "--trainer.callbacks+=lightning_vlmq.callbacks.QuantizedModelWriter",
        f"--trainer.callbacks.folder={root / 'saved'}",
    ]
    main([*start, "--results.run_id=w3", *quantized, *writer])
    main([*start, "--results.run_id=fewer", "--model.lst=false", "--data.n_concepts=12"])
    return root


def test_two_runs_side_by_side(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    main(["compare", "full", f"{folder}:w3", "--root", str(folder)])
    said = capsys.readouterr().out
    rows = (
        ResultsStore(folder)
        .rows()
        .query("metric == 'top1' and role == 'id' and dataset != ''")
        .set_index("run_id")["value"]
    )
    line = next(line for line in said.splitlines() if line.strip().startswith("Accuracy"))
    assert f"{100 * rows['full']:.1f}" in line and f"{100 * rows['w3']:.1f}" in line and "±" in line
    assert "Spurious correlation" in said and "full" in said


def test_models_that_nothing_tells_apart_say_nothing_of_how_many_images(tmp_path, capsys, monkeypatch):
    """Without one difference there is no standard error to plan by; two images are not enough for all that."""
    monkeypatch.setenv("COLUMNS", "160")
    (run_id,) = write_study(tmp_path, grid(["vit_clean"], [], [], []), size=0.1).run_ids()
    main(["power", run_id, run_id, "--root", str(tmp_path)])
    said = capsys.readouterr().out
    line = next(line.split() for line in said.splitlines() if line.strip().startswith("Calibration"))
    assert line[-4:] == ["–"] * 4 and "not one image tells the models apart" in " ".join(said.split())


def test_how_many_images_a_change_takes(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    main(["power", "full", "w3", "--root", str(folder), "--change", "2"])
    said = capsys.readouterr().out
    line = next(line.split() for line in said.splitlines() if line.strip().startswith("Calibration"))
    images, half, needed = (float(word.replace(",", "")) for word in line[-3:])
    assert images == 2 * SMALL_DATA["n_concepts"]
    assert half > 0
    assert needed == pytest.approx(
        images * ((norm.isf(0.025) + norm.isf(0.2)) * half / norm.isf(0.025) / 2) ** 2, rel=0.01
    )
    with pytest.raises(VLMQError, match="points above 0"):
        main(["power", "full", "w3", "--root", str(folder), "--change", "0"])


@pytest.mark.parametrize("drawn", ["both", "one"])
def test_random_weights_are_said_in_the_titles(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    full, own = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"])
    write_study(
        tmp_path,
        [replace(full, pretrained="none") if drawn == "both" else full, replace(own, pretrained="none")],
        size=0.06,
    )
    runs = sorted(ResultsStore(tmp_path).run_ids())
    title = "(random weights)" if drawn == "both" else f"(random weights: {runs[1]})"
    for command, what in (("compare", "Reliability"), ("power", "Images needed")):
        main([command, *runs, "--root", str(tmp_path)])
        assert f"{what} {title}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "message"), [(["full", "w4"], "unknown run .*'w4'"), (["full", "fewer"], "other samples")]
)
def test_what_cannot_be_compared(folder, runs, message):
    with pytest.raises(VLMQError, match=message):
        main(["compare", *runs, "--root", str(folder)])


def test_a_damaged_run_is_named_by_its_file(folder, tmp_path):
    for kind in ("results", "samples", "curves"):
        shutil.copytree(folder / kind, tmp_path / kind)
    path = tmp_path / "results" / "w3.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VLMQError, match=f"{re.escape(str(path))} cannot be read"):
        main(["compare", "full", "w3", "--root", str(tmp_path)])
    with pytest.raises(VLMQError, match=f"{re.escape(str(path))} cannot be read"):
        main(["card", str(folder / "saved"), "full", "w3", "--root", str(tmp_path)])


def test_a_card_says_what_was_done_and_what_it_did(folder, capsys):
    main(["card", str(folder / "saved"), "full", "w3", "--root", str(folder), "--license", "apache-2.0"])
    path = Path(capsys.readouterr().out.strip())
    assert path == folder / "saved" / "README.md"
    _, front, text = path.read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "apache-2.0" and about["base_model"] == "vit_clean" and "quantized" in about["tags"]
    rows = (
        ResultsStore(folder)
        .rows()
        .query("metric == 'top1' and role == 'id' and dataset != '' and run_id == 'w3'")["value"]
    )
    metrics = {metric["name"]: metric["value"] for metric in about["model-index"][0]["results"][0]["metrics"]}
    assert metrics["Accuracy: top-1"] == pytest.approx(rows.item(), abs=1e-6)
    for heading in ("Reliability", "What was quantized", "Spectra of the weights", "Data", "Again"):
        assert f"## {heading}\n" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every line of a table has as many cells
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert (
        "| `weight_bits` | 3 |" in text and "vlmq test --config eval --model.vlm vit_clean --model.checkpoint" in text
    )


def test_a_card_of_another_models_run_is_refused(folder):
    for runs in (["w3", "full"], ["w3", "w3"]):
        with pytest.raises(VLMQError, match=r"checkpoint|full precision"):
            main(["card", str(folder / "saved"), *runs, "--root", str(folder)])
    with pytest.raises(VLMQError, match="unknown run"):
        main(["card", str(folder / "saved"), "full", "w33", "--root", str(folder)])
