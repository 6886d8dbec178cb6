"""Images decoded once: the same pixels and identity as from their files, shared, bounded, and decoded anew where the file was damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cases.files import write_image, write_tree
from torch.utils.data import DataLoader

from lightning_vlmq.data import FileData
from lightning_vlmq.data.images import files as files_module
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.mapped import MappedImages, file_bytes, map_decoded
from lightning_vlmq.data.readers import Folder
from lightning_vlmq.data.sets import as_is

SETS = [Folder("mine", "mine", "id"), Folder("drawn", "drawn", "shift")]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("mine", "drawn"):
        write_tree(tmp_path / folder, rng, [f"{c}/{k}.png" for c in ("bag", "coat") for k in range(4)])
    return tmp_path


@pytest.fixture
def decodes(monkeypatch):
    """How often an image was decoded, by row."""
    counted: list[int] = []
    decode = FileImages.decode

    def counting(self, i):
        counted.append(i)
        return decode(self, i)

    monkeypatch.setattr(files_module.FileImages, "decode", counting)
    return counted


def build(root: Path, **options) -> FileData:
    data = FileData(SETS, str(root), num_workers=0, **{"image_size": 32, **options})
    data.setup("validate")
    return data


def batches(data: FileData) -> list[dict]:
    return [batch for s in data.eval_sets for batch in DataLoader(s.images, 3, collate_fn=as_is)]


def test_the_same_pixels_and_identity_and_each_image_decoded_once(root, decodes):
    plain = build(root)
    wanted = batches(plain)
    assert len(decodes) == 16
    folder = root / "decoded"
    for _ in range(2):  # runs
        data = build(root, decoded=str(folder))
        assert data.identity() == plain.identity() and [s.digest for s in data.eval_sets] == [
            s.digest for s in plain.eval_sets
        ]
        for one, other in zip(wanted, batches(data), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(decodes) == 32 and len(list(folder.glob("*.pixels"))) == 2
    assert all(isinstance(s.images, MappedImages) for s in data.eval_sets)
    assert torch.equal(data.eval_sets[0].images[5]["image"], plain.eval_sets[0].images[5]["image"])


def test_workers_map_the_file_themselves(root):
    images = build(root, decoded=str(root / "decoded")).eval_sets[0].images
    alone = torch.cat([b["image"] for b in DataLoader(images, 3, collate_fn=as_is)])
    assert torch.equal(alone, torch.cat([b["image"] for b in DataLoader(images, 3, num_workers=2, collate_fn=as_is)]))


def test_a_damaged_image_is_decoded_again_and_a_cut_file_made_anew(root, decodes, caplog):
    images = build(root, decoded=str(root / "decoded")).eval_sets[0].images
    wanted = images.__getitems__([0, 1])["image"]
    data = bytearray(images.path.read_bytes())
    data[3 * 32 * 32 + 17] ^= 1
    images.path.write_bytes(data)
    before = len(decodes)
    fresh = map_decoded(images.origin, images.path.parent, 0)
    assert torch.equal(fresh.__getitems__([0, 1])["image"], wanted) and decodes[before:] == [1]
    assert "image 1 in" in caplog.text and "decoded again" in caplog.text
    images.path.write_bytes(data[:-3])
    again = map_decoded(images.origin, images.path.parent, 0)
    assert len(decodes) == before + 1 + 8 and torch.equal(again.__getitems__([0, 1])["image"], wanted)


def test_room_is_bounded_and_what_has_none_is_said(root, caplog):
    one = file_bytes(build(root).eval_sets[0].images)
    data = build(root, decoded=str(root / "decoded"), decoded_gb=1.5 * one / 1e9)
    assert [type(s.images) for s in data.eval_sets] == [MappedImages, FileImages]
    assert "1 of 2 sets" in caplog.text and "drawn" in caplog.text
    assert sum(path.stat().st_size for path in (root / "decoded").glob("*.pixels")) == one


def test_what_is_there_already_counts(root):
    """Another size is another file: both share one bound, and what is there is used though there is no room for more."""
    one = file_bytes(build(root).eval_sets[0].images)
    place = {"decoded": str(root / "decoded"), "decoded_gb": 1.5 * one / 1e9}
    first = build(root, **place)
    other = build(root, **place, image_size=30)
    assert [type(s.images) for s in other.eval_sets] == [FileImages, FileImages]
    assert [type(s.images) for s in build(root, **place).eval_sets] == [type(s.images) for s in first.eval_sets]
    assert sum(path.stat().st_size for path in (root / "decoded").glob("*.pixels")) == one


def test_several_at_once_decode_once(root, decodes):
    images = build(root).eval_sets[0].images
    found: list = []
    threads = [
        threading.Thread(target=lambda: found.append(map_decoded(images, root / "decoded", 0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(decodes) == 8


def test_unreadable_images_and_full_disks_leave_the_files(root, caplog):
    (root / "mine" / "bag" / "1.png").write_bytes(b"no image")
    data = build(root, decoded=str(root / "decoded"), on_bad_image="skip")
    assert [type(s.images) for s in data.eval_sets] == [FileImages, MappedImages]
    assert "cannot be read, and is not kept decoded" in caplog.text
    (root / "file").write_text("in the way")
    data = build(root, decoded=str(root / "file"), on_bad_image="skip")
    assert all(isinstance(s.images, FileImages) for s in data.eval_sets) and "cannot be written" in caplog.text


def test_the_users_folder_may_be_written_as_a_shell_does(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.chdir(root)
    data = build(root, decoded="~/decoded")
    assert all(isinstance(s.images, MappedImages) for s in data.eval_sets)
    assert any((root / "home" / "decoded").iterdir()) and not (root / "~").exists()


def test_an_unreadable_image_stops_where_it_is_to(root):
    from lightning_vlmq.data.images import UnreadableImage

    write_image(root / "mine" / "bag" / "0.png", np.random.default_rng(1))
    (root / "mine" / "bag" / "1.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"1\.png"):
        build(root, decoded=str(root / "decoded"))
    assert not list((root / "decoded").glob("*.pixels"))
