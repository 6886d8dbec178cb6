"""The guard against images that calibrate and are evaluated."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases.files import encode, random_pixels, refused, write_tar

from lightning_vlmq.data import EmbeddedData, EvalSet, ReliabilityDataModule, TensorImages
from lightning_vlmq.data.images import DecodedImages, FileImages, Preprocess
from lightning_vlmq.data.images.archives import ParquetRows, TarMembers
from lightning_vlmq.data.images.sources import ArrayRows, FileTree
from lightning_vlmq.data.overlap import find_overlap, require_disjoint


@pytest.fixture
def rng():
    return np.random.default_rng()


def lazy(source, size=16):
    return FileImages(source, Preprocess(size), torch.arange(len(source)))


def as_files(folder, files):
    folder.mkdir()
    for k, content in enumerate(files):
        (folder / f"{k:02}.png").write_bytes(content)
    return lazy(FileTree.scan(folder))


def as_tar(folder, files):
    write_tar(folder.with_suffix(".tar"), [(f"{k}.png", content) for k, content in enumerate(files)])
    members, at = [], 0
    for k, content in enumerate(files):
        members.append((folder.with_suffix(".tar"), f"{k}.png", at + 512, len(content)))
        at += 512 + -(-len(content) // 512) * 512
    return lazy(TarMembers(members))


def as_parquet(folder, files):
    pq.write_table(pa.table({"image": files}), folder.with_suffix(".parquet"), row_group_size=3)
    return lazy(ParquetRows([folder.with_suffix(".parquet")], "image"))


def as_decoded(folder, files):
    images = as_files(folder, files)
    return DecodedImages(images, images.__getitems__(list(range(len(images))))["image"])


KINDS = {"files": as_files, "tar": as_tar, "parquet": as_parquet, "decoded": as_decoded}


@pytest.mark.parametrize("theirs", ["files", "tar", "parquet"])
@pytest.mark.parametrize("mine", KINDS)
def test_equal_files_are_found_wherever_they_lie(tmp_path, rng, mine, theirs):
    files = [encode(random_pixels(rng, 16, 16)) for _ in range(12)]
    a = KINDS[mine](tmp_path / "a", files[:7])
    b = KINDS[theirs](tmp_path / "b", [*files[7:], files[4], files[2]])
    shared = {hashlib.sha256(f).digest() for f in files[:7]} & {
        hashlib.sha256(f).digest() for f in (files[4], files[2])
    }
    found = find_overlap(a, b)
    assert len(found) == len(shared) == 2
    named = [int("".join(filter(str.isdigit, first.rpartition("/")[2].rpartition(":")[2]))) for first, _ in found]
    assert named == [2, 4]
    assert not find_overlap(a, KINDS[theirs](tmp_path / "c", files[7:]))


def test_array_and_files_are_compared_by_pixels_as_stored(tmp_path, rng):
    pixels = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels[3:])
    array = lazy(ArrayRows(np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "x.npy"), size=224)
    files = as_files(tmp_path / "a", [encode(p) for p in pixels[:5]])
    assert [first[-6:] for first, _ in find_overlap(files, array)] == ["03.png", "04.png"]
    assert len(find_overlap(array, files)) == 2
    other_shape = as_files(tmp_path / "b", [encode(np.pad(p, ((0, 1), (0, 0), (0, 0)))) for p in pixels])
    assert not find_overlap(other_shape, array)


def test_images_in_memory_are_compared_by_their_pixels(tmp_path, rng):
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    assert find_overlap(TensorImages(images[:5]), TensorImages(images[4:])) == [("row 4", "row 0")]
    assert not find_overlap(TensorImages(images[:4]), TensorImages(images[4:]))
    assert not find_overlap(TensorImages(images[:4]), TensorImages(images.flip(1)))
    files = as_files(tmp_path / "a", [encode(i.permute(1, 2, 0).numpy()) for i in images])
    assert len(find_overlap(TensorImages(images[6:]), files)) == 2


def test_same_size_is_not_same_file_and_one_bit_counts(tmp_path, rng):
    pixels = random_pixels(rng, 16, 16)
    content = bytearray(encode(pixels))
    other = bytes([*content[:-20], content[-20] ^ 1, *content[-19:]])
    assert not find_overlap(as_files(tmp_path / "a", [bytes(content)]), as_files(tmp_path / "b", [other]))


def test_unreadable_images_equal_nothing(tmp_path, rng):
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    array = lazy(ArrayRows(np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "x.npy"))
    cut = encode(random_pixels(rng, 32, 32))[:300]
    assert not find_overlap(as_files(tmp_path / "a", [cut, b"no image"]), array)


def test_only_files_of_equal_size_are_read(tmp_path, rng, monkeypatch):
    a = as_files(tmp_path / "a", [encode(random_pixels(rng, 16, 16))])
    b = as_files(tmp_path / "b", [encode(random_pixels(rng, 16, 16 + k)) for k in range(1, 9)])
    monkeypatch.setattr(FileTree, "encoded", lambda *_: pytest.fail("a file was read"))
    assert not find_overlap(a, b)


def module(pairs, images):
    data = ReliabilityDataModule(4, 4, 0)
    data.eval_sets = [EvalSet("in", "id", TensorImages(images, target=torch.zeros(len(images), dtype=torch.int64)))]
    data.pairs = TensorImages(pairs, caption=["x"] * len(pairs))
    return data


def test_any_data_module_is_guarded_where_pairs_are_used():
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    for use in ("calibration_batches", "train_dataloader"):
        bad = module(images[:5], images[3:])
        refused(getattr(bad, use), "2 of 5 calibration images", "'in'", "row 3 is row 0", "take other pairs")
        assert getattr(module(images[:3], images[3:]), use)()


def test_what_has_passed_is_not_compared_again_but_what_has_not_is(monkeypatch):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    good, bad = module(images[:3], images[3:]), module(images[:4], images[3:])
    good.require_disjoint_pairs()
    refused(bad.require_disjoint_pairs, "1 of 4")
    refused(bad.require_disjoint_pairs, "1 of 4")
    monkeypatch.setattr(TensorImages, "fingerprints", lambda _: pytest.fail("compared again"))
    good.require_disjoint_pairs()


@pytest.mark.parametrize("columns", [("image",), ("concept", "house")])
def test_embedded_pairs_are_checked_in_setup(columns, tmp_path):
    """By their drawings, since a drawing's scenes differ: one that is evaluated, or another one of the same cell."""
    from lightning_vlmq.data.embedded.concepts import FOLDER

    table = pq.read_table(FOLDER / "drawings.parquet")
    parts = table["part"].to_pylist()
    leak, source = parts.index("pairs") + 7, parts.index("house")
    for name in columns:
        values = table[name].to_pylist()
        values[leak] = values[source]
        table = table.set_column(table.column_names.index(name), name, [values])
    pq.write_table(table, tmp_path / "drawings.parquet")
    leaking = EmbeddedData(datasets=["concepts"], n_concepts=8, path=str(tmp_path / "drawings.parquet"))
    refused(leaking.setup, "1 of 1000 drawings of the caption pairs are evaluated too", f"row {leak} is row {source}")


def test_sets_are_named_one_by_one():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    sets = [EvalSet(name, "far_ood", TensorImages(part)) for name, part in (("a", images[:2]), ("b", images[2:]))]
    refused(lambda: require_disjoint(TensorImages(images[3:]), sets), "'b'", "1 of 1")
