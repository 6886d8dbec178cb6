"""The wheel is enough: installed in an environment of its own, from an empty folder, it does what README and the first hour show."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FIRST_HOUR = REPOSITORY / "docs" / "first-hour.md"


def shell(command, folder, **environment):
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(REPOSITORY),
    ]
    shell([sys.executable, *build], folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment that holds the wheel, and of this environment only what the wheel needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(shell([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", str(wheel)]
    shell([sys.executable, *install], folder, PYTHONPATH="")
    # then what it needs: an editable install there does not count, for its own .pth is not read
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


@pytest.fixture
def environment(installed):
    """Variables of a shell in that environment."""
    path = f"{installed}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", "COLUMNS": "100"}


def test_the_wheel_holds_what_the_program_reads_and_no_second_copy(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configs = {name.removeprefix("lightning_vlmq/") for name in names if name.startswith("lightning_vlmq/configs/")}
    assert configs == {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lightning_vlmq", *(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if "test" in name.lower() and name.endswith(".py")]
    assert wheel.stat().st_size < 70e6


def test_what_readme_shows_is_accepted_anywhere(environment, tmp_path):
    found = []
    for block in re.findall(r"```console\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [
            shlex.split(line, comments=True)[1:]
            for line in lines
            if re.match(r"(\.venv/bin/)?vlmq (validate|fit|test|predict)", line)
        ]
    assert found
    script = f"""
import lightning_vlmq, sys
from lightning_vlmq.cli import main
assert lightning_vlmq.__file__.startswith(sys.prefix), lightning_vlmq.__file__
for command in {found!r}:
    try:
        main([*command, "--print_config"])
    except SystemExit as ended:
        assert ended.code == 0, command
"""
    shell(["python", "-c", script], tmp_path, **environment)


def plain(text):
    """What a program says, but for numbers, how lines are broken and ruled, and where the folder is."""
    text = re.sub(r"\d+(\.\d+)?", "0", re.sub(r"[─━│┃┏┓┗┛└┘┌┐┡┩┳┻╇┴┬┼├┤╷╵ \n]+", " ", text))
    return re.sub(r"[−+-]?0", "0", text).strip()


def test_the_first_hour_is_as_told(environment, tmp_path):
    blocks = re.findall(r"```console\n(.*?)```", FIRST_HOUR.read_text(), re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        command, _, told = block.replace("\\\n", " ").partition("\n")
        assert command.startswith("$ ")
        said = shell(["bash", "-c", f"( {command[2:]} ) 2>&1"], tmp_path, **environment)
        answer = plain(
            said
        )  # a line that is told is said; there may be more, for a method or a command that came since
        for line in filter(None, map(plain, told.splitlines())):
            assert line in answer, f"{command}\n{line}\n{said}"
