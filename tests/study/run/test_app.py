"""The console script: what it refuses, what it reports, and a small study through the real command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases.small_data import SMALL_DATA
from cases.study import grid, write_study

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.counting import evaluations_in
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run import app as runner

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def vlmq_study(monkeypatch, capfd, tmp_path):
    """Call the entry point in this process from the repository; returns exit code, standard output and error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", ["vlmq-study", f"study.root={tmp_path / 'logs'}", *arguments])
        try:
            runner.entry_point()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return call


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("study=dmo", "Could not find 'study/dmo' Available options in 'study':"),
        ("study.axes.vlms=[vit_clean]", "Could not override 'study.axes.vlms'"),
        ("study.axes.method=[minmx]", "unknown method 'minmx'; did you mean minmax"),
        (
            "study.axes.method=[lsq_contrastive(start=mse)]",
            'in double quotes: study.axes.method=["lsq_contrastive(...)"]',
        ),
        ("study.axes.bits=[W4]", "bits 'W4' are not of the form"),
        ("seed=-1", "seed must be a whole number from 0, got -1"),
        ("seed=[0,1]", "seed must be a whole number from 0"),
        ("study.axes.vlm=[vit_clean", "no viable alternative"),
        ("report_only=true", "no results in"),
        ("retry=no", "retry must be true or false; got 'no'"),
        ("report_only=no", "report_only must be true or false; got 'no'"),
        ("compact=maybe", "compact must be true, false, or rows"),
        ("compact=true", "there is nothing to pack"),
        ("study.axes=5", "study.axes must be a table"),
        ("study.output=words", "study.output must be a list of words"),
        ("study.commands.ptq=[validat]", "unknown command of vlmq that files results 'validat'; did you mean validate"),
        ('+study.arguments.quantised=["--model.lst=false"]', "'quantised'; did you mean quantized"),
        ('study.arguments.extra=["--model.scors=[mcm]"]', "can start: "),
        ('study.arguments.extra=["--trainer.max_epochs=abc"]', "can start: "),
        ("study=null", "the study's config cannot be composed: "),
        ("--nonsense", "unrecognized arguments: --nonsense; vlmq-study --help"),
        ("--config-dir=/nowhere", "'/nowhere' holds neither sweep.yaml nor study"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(vlmq_study, argument, message):
    code, _, error = vlmq_study(argument)
    lines = [line for line in error.splitlines() if line]
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("vlmq-study: error: ") and message in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        "name: [a\n b: c",
        "name: one\nname: two\n",
        "- a\n- b\n",
        "defaults: [bse]\nname: own\n",
        "name: ${nothing}\n",
        "name: own\n",
    ],
)
def test_a_broken_study_of_ones_own_is_one_line(vlmq_study, tmp_path, content):
    (tmp_path / "mine" / "study").mkdir(parents=True)
    (tmp_path / "mine" / "study" / "own.yaml").write_text(content)
    code, _, error = vlmq_study("study=own", f"--config-dir={tmp_path / 'mine'}", "status")
    assert code == 2 and error.startswith("vlmq-study: error: ") and error.count("\n") == 1, error


def test_options_may_stand_anywhere():
    words = ["study=demo", "-m", "study.shard=1/2,2/2", "--config-dir", "mine", "seed=1"]
    assert runner.arranged(words) == ["-m", "--config-dir", "mine", "study=demo", "study.shard=1/2,2/2", "seed=1"]


def test_two_things_are_not_done_at_once(vlmq_study):
    for words in (("status", "--dry-run"), ("compact=true", "report_only=true"), ("report_only=true", "retry=true")):
        monkeyed = [runner.WORDS.get(word, word) for word in words]
        code, _, error = vlmq_study(*words)
        assert code == 2 and error.count("\n") == 1, error
        assert "cannot be done at once" in error and all(word.partition("=")[0] in error for word in monkeyed)


def test_a_look_leaves_nothing_behind(vlmq_study, tmp_path):
    code, output, error = vlmq_study("status", "study.axes.vlm=[vit_clean]")
    assert code == 0, error
    assert "0 of 13 runs done" in output and not (tmp_path / "logs").exists()


def test_bad_input_in_a_multirun_is_exit_code_2(vlmq_study):
    code, _, error = vlmq_study("-m", "study.axes.method=[minmx],[minmax]", "study.axes.vlm=[]")
    assert code == 2 and "vlmq-study: error:" in error and "Traceback" not in error


def test_configs_are_found_beside_the_package_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert runner.find_configs(["study=demo"]) == REPOSITORY / "configs"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sweep.yaml").touch()
    assert runner.find_configs([]) == tmp_path / "configs"
    assert runner.find_configs(["--config-dir", str(REPOSITORY / "configs")]) == REPOSITORY / "configs"
    with pytest.raises(VLMQError, match=r"--config-dir .* holds neither sweep\.yaml"):
        runner.find_configs(["-m", "--config-dir"])


def test_studies_of_ones_own_join_those_of_the_package(vlmq_study, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "study").mkdir(parents=True)
    (tmp_path / "mine" / "study" / "own.yaml").write_text("defaults: [demo, _self_]\nname: own\n")
    assert runner.find_configs(["--config-dir=mine"]) == REPOSITORY / "configs"
    code, _, error = vlmq_study("study=own", "report_only=true", f"--config-dir={tmp_path / 'mine'}")
    assert code == 2 and "no results in" in error


def test_report_only(vlmq_study, tmp_path):
    keys = grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision"])
    write_study(tmp_path / "logs", keys, size=0.05)
    code, output, error = vlmq_study("report_only=true")
    assert code == 0, error
    assert (tmp_path / "logs" / "report.html").exists() and str(tmp_path / "logs" / "report.html") in output
    for word in (
        "vit_clean",
        "minmax W4A8 vision",
        "top-1",
        "AUROC near",
        "corrupted",
        "RSG",
        "seconds per stage",
        "tensorboard",
    ):
        assert word in output
    (tmp_path / "logs" / "results" / "notes.txt").write_text("mine")
    code, output, _ = vlmq_study("report_only=true")
    assert code == 0 and "left out" in output and "notes.txt is no part of a results store" in output


def test_help_shows_studies_and_config(vlmq_study):
    code, output, _ = vlmq_study("--help")
    assert code == 0 and "study: " in output and "axes:" in output and "demo" in output


def test_a_small_study_with_a_failing_vlm(tmp_path, vlmq_study):
    """Two VLMs, one of which cannot be loaded: its runs fail and are named, the others end in the report."""
    empty = tmp_path / "empty"
    empty.mkdir()
    quoted = ",".join(f'"--data.{key}={value}"'.replace("'", "").replace(" ", "") for key, value in SMALL_DATA.items())
    arguments = [
        f"study.root={tmp_path}",
        f"study.axes.vlm=[vit_clean,'local-dir:{empty}']",
        "study.axes.method=[minmax]",
        "study.axes.bits=[W4A8]",
        "study.axes.scope=[vision]",
        f"study.arguments.extra=[{quoted}]",
    ]
    command = [sys.executable, "-m", "lightning_vlmq.study.run.app", "study=demo", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "report.html").exists()
    runs = {path.stem for path in (tmp_path / "results").glob("*.parquet")}
    own = {run for run in runs if not run.endswith(".lst")}
    assert len(own) == 2 and runs - own == {f"{run}.lst" for run in own}
    assert len(list((tmp_path / "failures").glob("*.txt"))) == 2
    assert (
        done.stdout.count("✓") == 2
        and done.stdout.count("✗") == 2
        and done.stdout.count(f"failed local-dir:{empty}") == 2
    )
    assert "minmax W4A8 vision" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert list((tmp_path / "tensorboard" / "vit_clean-fp32-s0").rglob("events.out.*"))
    planned = re.search(r"4 runs, (\d+) evaluation runs", done.stdout)
    store = ResultsStore(tmp_path)
    assert int(planned[1]) == 2 * evaluations_in(store.rows())  # of two VLMs, one of which has no results
    assert store.rows(sorted(own)).query("metric == 'output_sqnr_db'")["value"].between(5, 60).sum() == 1
    code, output, _ = vlmq_study("study=demo", *arguments, "--status")
    assert code == 0 and f"2 of 4 runs done, 2 failed, 0 running, {int(planned[1]) // 2} evaluation runs" in output
    assert len(re.findall(r"failed +local_dir_", output)) == 2 and "running  " not in output
    code, output, _ = vlmq_study("study=demo", *arguments)
    assert code == 1 and "2 runs failed before and are left out" in output and "✗" not in output
    code, output, error = vlmq_study("study=demo", *arguments, "study.axes.vlm=[vit_clean]", "--dry-run")
    assert code == 0, error
    assert f"{int(planned[1]) // 2:,}" in output and "hours" in output and "disk, features (cache=reference)" in output
