"""``vlmq data check``, as a user runs it and as a function."""

from pathlib import Path

import numpy as np
import pytest
from cases.files import refused, write_tree
from rich.console import Console

from lightning_vlmq.cli import main
from lightning_vlmq.data import EmbeddedData, FileData
from lightning_vlmq.data.check import check, table
from lightning_vlmq.data.readers import Folder, FolderPairs


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng()
    write_tree(tmp_path / "mine", rng, [f"{c}/{k}.png" for c in ("bag", "coat") for k in range(6)])
    write_tree(tmp_path / "elsewhere", rng, [f"{k}.png" for k in range(5)])
    write_tree(tmp_path / "captioned", rng, [f"{k}.png" for k in range(100)])
    for k in range(100):
        (tmp_path / "captioned" / f"{k}.txt").write_text(f"caption {k}")
    return tmp_path


REPOSITORY = Path(__file__).parents[2]
FOLDER = ["--config", "configs/data/folder.yaml"]


def test_all_is_well(root, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    quiet_check(
        "--config", "configs/eval.yaml", *FOLDER, f"--data.root={root}"
    )  # what the experiment's config says else is passed over
    shown = capsys.readouterr().out
    for word in ("mine", "elsewhere", "far_ood", "12", "caption pairs", "100", "ok"):
        assert word in shown


def test_something_is_not(vlmq, root):
    (root / "elsewhere" / "3.png").write_bytes(b"no image")
    done = vlmq("data", "check", *FOLDER, f"--data.root={root}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert (
        line.startswith("vlmq: error: 1 of 3 checks failed; elsewhere:") and str(root / "elsewhere" / "3.png") in line
    )
    assert "mine" in done.stdout and "ok" in done.stdout  # the others are looked at all the same


def quiet_check(*args):
    main(["data", "check", *map(str, args)])


def test_every_set_is_looked_at(root, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (root / "mine").rename(root / "yours")
    refused(lambda: quiet_check(*FOLDER, f"--data.root={root}"), "1 of 3", "mine: data folder", root / "mine")
    assert "elsewhere" in capsys.readouterr().out


def data(root, *sets, pairs=True, **kwargs):
    sets = sets or (Folder("mine", "mine", "id"), Folder("elsewhere", "elsewhere", "far_ood"))
    chosen = {"image_size": 16, "num_workers": 2, "calibration_pairs": 100, **kwargs}
    return FileData(sets, str(root), FolderPairs("captioned") if pairs else None, **chosen)


def test_sample_or_all_images_are_decoded(root):
    assert [(f.n, f.tried) for f in check(data(root), sample=4)] == [(12, 4), (5, 4), (100, 4)]
    assert [(f.n, f.tried) for f in check(data(root), full=True)] == [(12, 12), (5, 5), (100, 100)]
    for k in (17, 63):
        (root / "captioned" / f"{k}.png").write_bytes(b"")
    assert not any(f.problem for f in check(data(root), sample=0))
    *_, pairs = check(data(root), full=True)
    assert pairs.name == "caption pairs" and "17.png" in pairs.problem and "2 such images of 100" in pairs.problem
    assert "caption pairs" in _shown(table([pairs]))


def test_what_is_wrong_only_together_is_found(root):
    (root / "captioned" / "8.png").write_bytes((root / "elsewhere" / "1.png").read_bytes())
    *_, together = check(data(root))
    assert together.name == "together" and "1 of 100 calibration images" in together.problem
    twice = data(root, Folder("mine", "x", "id"), Folder("mine", "x", "shift"))
    assert "called x" in check(twice)[-1].problem
    assert "data.sets is empty" in check(FileData((), str(root)))[0].problem


def test_an_id_set_is_not_needed(root):
    assert not any(f.problem for f in check(data(root, Folder("elsewhere", "elsewhere", "far_ood"), pairs=False)))


def test_data_in_memory(tmp_path):
    findings = check(EmbeddedData(datasets=["concepts", "digits"], n_concepts=8, n_ood=7))
    assert [(f.name, f.n, f.tried) for f in findings] == [("concepts", 16, 16), ("digits", 7, 7)]
    (finding,) = check(EmbeddedData(path=str(tmp_path)))
    assert "does not exist" in finding.problem


def test_bad_command_lines(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    refused(lambda: main(["data", "chekc"]), "chekc", "check")
    refused(lambda: main(["data"]), "check")
    refused(lambda: quiet_check("--config", "no/such.yaml"), "no/such.yaml")
    refused(lambda: quiet_check(*FOLDER, "--data.rot=x"), "rot")
    refused(lambda: quiet_check(), "data")


def _shown(what):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(what)
    return captured.get()
