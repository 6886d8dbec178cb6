"""The page about the mechanism says what the store holds."""

import importlib.util
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from cases.mechanism import VLMS, write_mechanism
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from lightning_vlmq import callbacks
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import PUBLISHED_BANDS
from lightning_vlmq.study.analysis import runs
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "make_mechanism_page.py"
spec = importlib.util.spec_from_file_location("make_mechanism_page", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_mechanism(root)
    page = tmp_path_factory.mktemp("docs") / "mechanism.md"
    page.write_text((REPOSITORY / "docs" / "mechanism.md").read_text())
    before = page.read_text()
    page.write_text(before.replace("No results are stated", "Other results were stated"))  # are written over
    done = subprocess.run([sys.executable, SCRIPT, root, page], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, page


def test_the_numbers_are_the_store_s(made):
    root, page = made
    text = page.read_text()
    whole = pd.read_parquet(page.parent / "data" / "mechanism.parquet")
    assert set(whole["table"]) == {"gains", "verdicts", "predictions"}
    gains = whole[whole["table"] == "gains"].set_index("setting")
    assert list(gains["band"].unique()) == ["0-8"] and len(gains) == 4
    noise = gains.loc["matched_noise for minmax W4A8 vision"]  # its two seeds count as one
    assert noise["gain"] == pytest.approx(0.985) and noise["n_vlms"] == 1
    rows = pd.concat(pd.read_parquet(p) for p in (root / "results").glob("*.parquet"))
    own = rows[(rows["metric"] == "gain_0-8") & (rows["method"] == "gptq")]["value"]
    found = gains.loc["gptq W4A8 vision"]
    assert found["gain"] == pytest.approx(own.mean()) and found["n_vlms"] == len(VLMS)
    assert found["damped"] == (own < 1 - 2 * 0.01).sum() == 0
    assert f"| gptq W4A8 vision | 0-8 | {own.mean():.3f} |" in text
    verdicts = whole[whole["table"] == "verdicts"]
    assert set(verdicts["control"]) == {"matched_noise", "spectral_shrink", "heal 64+", "hurt 64+"}
    reproduced = verdicts[(verdicts["vlm"] == "all VLMs") & (verdicts["verdict"] == "reproduces")]
    assert set(reproduced["control"]) == {"matched_noise", "heal 64+"}
    assert "3 VLMs (convnext_noisy, siglip_clean, vit_clean): 9 quantized models, 18 controls, 9 surgeries" in text
    assert "`heal 64+` | `hurt 64+`" in text and text.index("`matched_noise`") < text.index("`heal 64+`")


def test_page_and_files_are_whole_and_small(made):
    root, page = made
    text = page.read_text()
    assert text.count(script.START) == text.count(script.END) == 1 and "results were stated" not in text
    assert text.split(script.START)[0] == (REPOSITORY / "docs" / "mechanism.md").read_text().split(script.START)[0]
    for name in ("gain", "verdicts", "prediction"):
        assert f"images/mechanism_{name}.png" in text
        with Image.open(page.parent / "images" / f"mechanism_{name}.png") as image:
            assert min(image.size) > 150
    path = page.parent / "data" / "mechanism.parquet"
    about = pq.read_schema(path).metadata
    assert path.stat().st_size < 1e6
    n_runs = len(list((root / "results").glob("*.parquet")))
    assert about[b"hardware"] and about[b"duration"].decode() == str(timedelta(minutes=n_runs))  # as long as runs took
    assert f"{timedelta(minutes=n_runs)} of work" in text
    for line in text.split(script.START)[1].split("\n"):
        assert not line.startswith("|") or line.count("|") >= 4


def test_controls_that_cannot_be_judged_are_no_page(made, monkeypatch):
    root, page = made
    before = page.read_text()
    monkeypatch.setattr(runs, "MANY_OF_ONE_VLM", 3)
    with pytest.raises(VLMQError, match="no verdicts on controls") as said:
        script.write(analyse(StudyResults.load(root)), page)
    assert "\n" not in str(said.value) and page.read_text() == before


def test_the_command_says_what_was_run_of_the_study(made):
    """Methods of the store that the study has, under its own names and in its order; the shell and Hydra read them."""
    _, page = made
    command = pq.read_schema(page.parent / "data" / "mechanism.parquet").metadata[b"command"].decode()
    program, study, *words = shlex.split(command)
    assert (program, study) == ("vlmq-study", "study=mechanism") and f"`{command}` on " in page.read_text()
    axes = {o.key_or_group: [str(v) for v in o.value()] for o in OverridesParser.create().parse_overrides(words)}
    assert axes.pop("study.axes.vlm") == sorted(VLMS)
    assert axes.pop("study.axes.bits") == ["W4A8"]
    noises = [f"matched_noise(seed={k})" for k in range(1, 5)]
    assert axes.pop("study.axes.method") == ["minmax", "gptq", "matched_noise", "spectral_shrink", *noises]
    assert not axes  # the scope is not one of the study's


def test_the_study_measures_what_the_page_asks_in_the_same_ranks():
    (words,) = (w for w in yaml.safe_load(script.CONFIG.read_text())["arguments"]["extra"] if "callbacks" in w)
    names = [name.rsplit(".", 1)[1] for name in words.partition("=[")[2].rstrip("]").split(",")]
    made = [getattr(callbacks, name)() for name in names]
    assert {"ActivationSpectrum", "BandAccuracies", "ErrorSurgery"} <= set(names)
    assert {callback.bands for callback in made if hasattr(callback, "bands")} == {PUBLISHED_BANDS}


def test_what_cannot_be_written_is_one_line(tmp_path):
    page = tmp_path / "other.md"
    page.write_text("# No place")
    with pytest.raises(VLMQError, match="no place for results"):
        script.write(None, page)
