"""The cache of features: damage heals, what cannot be written costs a warning, modes follow the umask."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from lightning_vlmq.core.atomic import remove_leftovers, replacing
from lightning_vlmq.evaluation.features import FeatureCache

FEATURES = torch.arange(12.0).reshape(4, 3)


def test_what_is_kept_comes_back(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    cache.put("tower", "set", FEATURES)
    assert torch.equal(cache.get("tower", "set", 4), FEATURES)


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "foreign", "rows", "empty"])
def test_damage_is_told_deleted_and_made_anew(damage, tmp_path, caplog):
    cache = FeatureCache(tmp_path)
    cache.put("tower", "set", FEATURES)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-2] ^= 4
    elif damage == "zeros":
        data[-16:] = bytes(16)
    elif damage == "cut":
        data = data[:-5]
    elif damage == "empty":
        data = bytearray()
    path.write_bytes(data)
    if damage == "foreign":
        save_file({"features": FEATURES}, path)
    assert cache.get("tower", "set", 5 if damage == "rows" else 4) is None
    assert not path.exists() and "damaged" in caplog.text
    assert torch.equal(cache.of("tower", "set", lambda: FEATURES, 4), FEATURES) and path.exists()


def test_what_is_not_finite_is_not_kept(tmp_path):
    FeatureCache(tmp_path).put("tower", "set", FEATURES / 0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file")
    for name in ("a", "b"):
        assert torch.equal(cache.of("tower", name, lambda: FEATURES), FEATURES)
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        FeatureCache(tmp_path).put("tower", "set", FEATURES)
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    with replacing(tmp_path / "x") as partial:
        dead = partial.with_name(partial.name.replace(f"-{os.getpid()}-", "-4194303-"))
        dead.write_text("half")
        assert remove_leftovers(tmp_path) == 1
        assert partial.exists() and not dead.exists()
