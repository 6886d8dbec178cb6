"""Embedded sets that were made into a file are the ones made in memory, for every process, and whatever became of the file."""

import pytest
import torch

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.data.embedded import kept
from lightning_vlmq.data.embedded.sets import DATASETS

SMALL = {"n_concepts": 16, "n_shifted": 12, "n_ood": 9, "corruptions": ["contrast"], "severities": [1, 5]}


def sets(folder, **options):
    kept.kept_sets.cache_clear()  # as in another process
    module = EmbeddedData(
        **{**SMALL, "calibration_pairs": 60, **options}, decoded=None if folder is None else str(folder)
    )
    module.setup("validate")
    return module.eval_sets


@pytest.fixture(scope="module")
def plain():
    return sets(None)


def same(found, wanted):
    assert [s.identity() for s in found] == [s.identity() for s in wanted]
    for one, other in zip(found, wanted):
        batches = (s.images.__getitems__([0, 2]) for s in (one, other))
        for a, b in zip(*(batch.values() for batch in batches)):
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_made_once_and_the_same(tmp_path, plain, monkeypatch):
    same(sets(tmp_path), plain)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(files) == len(list(DATASETS))
    monkeypatch.setattr(kept, "_write", lambda *_: pytest.fail("made again"))
    same(sets(tmp_path), plain)
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_other_recipes_have_other_files(tmp_path):
    two = {"datasets": ["corruptions"]}
    first, other = sets(tmp_path, **two), sets(tmp_path, **two, data_seed=1)
    assert len(list(tmp_path.glob("corruptions-*"))) == 2 and first[0].digest != other[0].digest


def test_a_damaged_file_is_made_again_and_no_folder_is_no_end(tmp_path, plain, caplog):
    sets(tmp_path / "there")
    for path in (tmp_path / "there").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1000] ^= 255
        path.write_bytes(content if "digits" in path.name else content[:500])
    same(sets(tmp_path / "there"), plain)
    assert "is not what was written" in caplog.text and "is damaged" in caplog.text
    (tmp_path / "file").touch()
    same(sets(tmp_path / "file"), plain)
    assert "images are made in every process" in caplog.text
