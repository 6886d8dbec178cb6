"""The cache of features: damage heals, what cannot be written costs a warning, modes follow the umask."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_vlmq.core.atomic import MACHINE, remove_leftovers, replacing
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.sets import EvalSet, TensorImages
from lightning_vlmq.evaluation.features import FeatureCache, require_unit
from lightning_vlmq.evaluation.set_features import SetFeatures
from lightning_vlmq.models import load_vlm
from lightning_vlmq.models.local import encode_patches

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


def test_what_is_kept_is_said(tmp_path):
    """Full precision's images and all texts stay, a quantized tower's images until this process's next one; or nothing is kept."""
    cache = FeatureCache(tmp_path, "reference")
    cache.lasting.add("full")
    for tower in ("full", "first"):
        cache.put(tower, "set", FEATURES)
        cache.put(tower, "texts_x", FEATURES)
    assert all(cache.get(tower, what) is not None for tower in ("full", "first") for what in ("set", "texts_x"))
    gone, old, elsewhere = (tmp_path / "passing" / name for name in (f"{MACHINE}-4194303", "old-1", "other-4194303"))
    for folder in (gone, old, elsewhere):
        folder.mkdir()
        save_file({"features": FEATURES}, folder / "first_set.safetensors")
    os.utime(old, (0, 0))
    cache.put("second", "set", FEATURES)
    cache.put("second", "other", FEATURES)
    assert cache.get("first", "set") is None and cache.get("first", "texts_x") is not None
    assert all(cache.get("second", name) is not None for name in ("set", "other")) and not gone.exists()
    assert not old.exists() and list(elsewhere.iterdir())
    assert cache.get("full", "set") is not None and (cache.hits, cache.misses) == (8, 1)
    assert FeatureCache(tmp_path).get("second", "set") is None  # another study's runs do not see what passes
    nothing = FeatureCache(tmp_path / "none", "none")
    nothing.put("full", "set", FEATURES)
    nothing.settle(tmp_path / "none")
    assert nothing.folder is None and nothing.get("full", "set") is None and not (tmp_path / "none").exists()


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


def parts(cache, shares):
    for process, rows in shares.items():
        cache.put_part("tower", "set", process, torch.tensor(rows), FEATURES[rows])


def test_parts_of_several_processes_become_one_entry(tmp_path):
    cache = FeatureCache(tmp_path)
    parts(cache, {0: [0, 3], 1: [2], 2: [1]})
    assert cache.get("tower", "set", 4) is None  # none is an entry
    assert cache.merge("tower", "set", 3, 4) == 3
    assert torch.equal(cache.get("tower", "set", 4), FEATURES)
    cache.drop_part("tower", "set", 1)
    assert cache.merge("tower", "set", 3, 4) == 3  # is there already
    for process in range(3):
        cache.drop_part("tower", "set", process)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("shares", "found"), [({0: [0, 2]}, 1), ({0: [0], 1: [1, 2]}, 2), ({}, 0)])
def test_less_than_the_whole_set_is_not_kept(shares, found, tmp_path):
    cache = FeatureCache(tmp_path)
    parts(cache, shares)
    assert cache.merge("tower", "set", 2, 4) == found and cache.get("tower", "set", 4) is None


def test_a_damaged_part_counts_as_none(tmp_path):
    cache = FeatureCache(tmp_path)
    parts(cache, {0: [0, 1], 1: [2, 3]})
    (second,) = tmp_path.glob("*.part1")
    second.write_bytes(second.read_bytes()[:20])
    assert cache.merge("tower", "set", 2, 4) == 1 and cache.get("tower", "set", 4) is None


class OnGpuOnly(TorchDispatchMode):
    """Refuses whatever makes the CPU wait for a GPU: reading a number, or a shape that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::").split(".")[0] in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
        ):
            raise AssertionError(f"{func.name()} waits for the GPU")
        return func(*args, **(kwargs or {}))


def test_known_features_are_looked_up_without_waiting(tmp_path, monkeypatch):
    images = TensorImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), target=torch.arange(4))
    s, cache = EvalSet("set", "id", images), FeatureCache(tmp_path)
    cache.put("tower", s.digest, FEATURES)
    known = SetFeatures(cache, "tower", s)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda *_: pytest.fail("waits for the GPU"))
    monkeypatch.setattr(torch.Tensor, "item", lambda *_: pytest.fail("waits for the GPU"))
    with OnGpuOnly():
        found = known.of(np.array([2, 0]), torch.device("cpu"), lambda: pytest.fail("computed again"))
    assert torch.equal(found, FEATURES[[2, 0]])


def test_patches_of_which_nothing_is_left_are_no_overflow():
    features = F.normalize(torch.randn(5, 9, 4), dim=-1)
    features[1, 3] = 0  # one patch; of another image all
    require_unit(features, "images")
    features[2] = 0
    with pytest.raises(VLMQError, match="no features for 1 of 5 images"):
        require_unit(features, "images")
    features[[0, 4], 0] = torch.tensor([[torch.nan], [torch.inf]])
    with pytest.raises(VLMQError, match="no features for 3 of 5 images"):
        require_unit(features, "images")
    with pytest.raises(VLMQError, match="no features for 1 of 3 texts"):
        require_unit(torch.eye(3) * torch.tensor([1.0, 1.0, 0.0]), "texts")


@pytest.mark.parametrize(("name", "layer"), [("align_clean", "conv_head"), ("vit_clean", "proj")])
def test_patches_that_overflow_are_not_taken_for_empty_ones(name, layer):
    vlm, pixels = load_vlm(name), torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    before = encode_patches(vlm, pixels)
    weights = [p for n, p in vlm.model.visual.named_parameters() if layer in n]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1e-30)
        assert torch.isfinite(encode_patches(vlm, pixels)).all()
        for weight in weights:
            weight.mul_(1e60)
        after = encode_patches(vlm, pixels)
    assert torch.isfinite(before).all() and not (after == 0).all(-1).any() and after.isnan().any()
