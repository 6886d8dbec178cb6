"""Files are whole or not there, on disk before they are in place, of the umask's mode; a disk that is full is named by path."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from cases.store import make_curves, make_rows, make_samples
from safetensors.torch import save_file

from lightning_vlmq.core import atomic
from lightning_vlmq.core.atomic import remove_leftovers, replacing, require_writable, write_text
from lightning_vlmq.core.errors import VLMQError, in_one_line
from lightning_vlmq.core.names import file_name
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.experiment import WholeCheckpoints
from lightning_vlmq.quant.checkpoint import write_tensors
from lightning_vlmq.results.store import ResultsStore

LARGE = torch.rand(50_000)


@contextmanager
def full_disk(limit: int = 20_000):
    """No file may grow beyond a limit: writes fail as on a full disk, through the operating system."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def by_text(path):
    write_text(path, "x" * 200_000)


def by_safetensors(path):
    write_tensors(path, {"x": LARGE})


def by_parquet(path):
    with replacing(path) as partial:
        pd.DataFrame({"x": LARGE.numpy()}).to_parquet(partial)


def by_torch(path):
    WholeCheckpoints().save_checkpoint({"x": LARGE}, path)


WRITERS = [by_text, by_safetensors, by_parquet, by_torch]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_line_with_the_path_and_leaves_what_was_there(write, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with full_disk(), pytest.raises(OSError) as caught:
        write(path)
    assert str(path) in in_one_line(caught.value) and "\n" not in in_one_line(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"
    write(path)
    assert path.stat().st_size > 100_000


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("write", WRITERS)
def test_modes_follow_the_umask(write, umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "folder" / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_moved_in_place_was_flushed_before(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (done.append(("flush", os.readlink(f"/proc/self/fd/{d}"))), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("move", str(a))), replace(a, b)))
    ResultsStore(tmp_path).write("a", make_rows("a"), make_samples(), make_curves())
    FeatureCache(tmp_path / "cache").put("tower", "set", torch.rand(4, 3))
    moves = [k for k, (what, _) in enumerate(done) if what == "move"]
    assert len(moves) == 4
    for k in moves:
        assert done[k - 1] == ("flush", done[k][1]) and done[k + 1] == ("flush", str(Path(done[k][1]).parent))


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from lightning_vlmq.core.atomic import replacing
with replacing(Path({str(tmp_path / "below" / "a")!r})) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    (left,) = (tmp_path / "below").iterdir()
    own = tmp_path / "below" / f".b.{atomic.MACHINE}-{os.getpid()}-00000000.partial"
    elsewhere = tmp_path / "below" / ".c.ffffffff-1-00000000.partial"
    for path in (own, elsewhere):
        path.touch()
    assert remove_leftovers(tmp_path) == 0 and remove_leftovers(tmp_path, below=True) == 1
    assert not left.exists() and own.exists() and elsewhere.exists()
    os.utime(elsewhere, (0, 0))  # of another machine, long ago
    write_text(tmp_path / "below" / "d", "")
    assert not elsewhere.exists() and own.exists()


def test_containers_of_one_name_are_told_apart(monkeypatch):
    """Each numbers its processes by itself: what is no process here may be writing there."""
    found = set()
    for numbering in ("pid:[1]", "pid:[2]", "pid:[1]"):
        monkeypatch.setattr(os, "readlink", lambda path, numbering=numbering: numbering)
        found.add(atomic._machine())
    monkeypatch.setattr(os, "readlink", lambda path: Path("/nowhere").stat())
    assert len(found) == 2 and atomic._machine() not in found


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    cache = FeatureCache(tmp_path)
    features = torch.nn.functional.normalize(torch.rand(2_000, 8), dim=1)
    with full_disk():
        assert torch.equal(cache.of("tower", "one", lambda: features), features)
        cache.put("tower", "two", features)
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text and not list(tmp_path.iterdir())


def test_results_that_cannot_be_written_are_named(tmp_path):
    with full_disk(), pytest.raises(VLMQError, match=r"samples/a\.parquet' cannot be written"):
        ResultsStore(tmp_path).write("a", make_rows("a"), make_samples(5_000), make_curves())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_places_that_are_no_folders(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        require_writable(tmp_path / "file" / "below")
    assert str(tmp_path / "file") in in_one_line(caught.value)
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / "file").mkdir(parents=True, exist_ok=True)
    said = in_one_line(caught.value)
    assert said.startswith(f"'{tmp_path / 'file'}': File exists; ") and "give a place" in said and "\n" not in said
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").mkdir(parents=True, exist_ok=True)  # a folder is what is wanted there
    assert in_one_line(ZeroDivisionError()) is None and in_one_line(VLMQError("a\nb\x1b[31m")) == "a b [31m"


def test_an_entry_that_was_exchanged_is_computed_again(tmp_path):
    cache, features = FeatureCache(tmp_path), torch.nn.functional.normalize(torch.rand(5, 3), dim=1)
    cache.put("tower", "set", features)
    save_file({"features": torch.zeros(5, 3)}, tmp_path / "tower_set.safetensors", {"digest": "0" * 16})
    assert cache.get("tower", "set") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".", "..", "-rf", "$x$", "a\nb", "ä🦊", "=1", "x" * 300, "a b"])
def test_any_name_is_a_file_of_its_own(name, tmp_path):
    write_text(tmp_path / f"{file_name(name)}.parquet", "")
    assert len(list(tmp_path.iterdir())) == 1 and file_name(name) != file_name(name + "!")
    assert file_name("concepts_1.x-y") == "concepts_1.x-y"
