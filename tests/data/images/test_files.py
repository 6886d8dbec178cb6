"""Decoding on demand: open_clip's pixels, loader processes, unreadable images, digests."""

import os

import numpy as np
import open_clip
import pytest
import torch
from cases.files import encode, random_pixels, reading, refused, write_image, write_tar, write_tree
from PIL import Image
from torch.utils.data import DataLoader

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images import FileImages, Preprocess, UnreadableImage
from lightning_vlmq.data.images.archives import ParquetRows, TarMembers
from lightning_vlmq.data.images.files import decode_all
from lightning_vlmq.data.images.sources import ArrayRows, FileTree
from lightning_vlmq.data.sets import as_is


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def tree(tmp_path, rng):
    write_tree(tmp_path / "set", rng, [f"{k}.png" for k in range(7)])
    return tmp_path / "set"


def images_of(folder, size=16, **kwargs):
    source = FileTree.scan(folder)
    return FileImages(source, Preprocess(size), torch.arange(len(source)), **kwargs)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize(("height", "width"), [(40, 57), (57, 40), (32, 32), (9, 31)])
def test_pixels_are_open_clips(rng, mode, height, width):
    image = Image.fromarray(random_pixels(rng, height, width)).convert(mode)
    theirs = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic")(
        image
    )
    mine = Preprocess(32)(image)
    assert mine.dtype == torch.uint8 and torch.equal(mine, (theirs * 255).round().to(torch.uint8))


def test_border_is_cut_first(rng):
    pixels = random_pixels(rng, 36, 36)
    inner = np.ascontiguousarray(pixels[2:-2, 2:-2])
    assert torch.equal(Preprocess(32, border=2)(Image.fromarray(pixels)), torch.from_numpy(inner).permute(2, 0, 1))
    assert "image_size" in refused(lambda: Preprocess(0))


def test_batches_equal_single_images_whatever_the_source(tmp_path, rng):
    pixels = [random_pixels(rng, 16, 16) for _ in range(6)]
    files = [encode(p) for p in pixels]
    for k, content in enumerate(files):
        (tmp_path / f"{k}.png").write_bytes(content)
    write_tar(tmp_path / "x.tar", [(f"{k}.png", content) for k, content in enumerate(files)])
    members, at = [], 0
    for k, content in enumerate(files):
        members.append((tmp_path / "x.tar", f"{k}.png", at + 512, len(content)))
        at += 512 + -(-len(content) // 512) * 512
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": files[:4]}), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"image": [{"bytes": f, "path": ""} for f in files[4:]]}), tmp_path / "b.parquet")
    np.save(tmp_path / "x.npy", np.stack(pixels))
    sources = [
        FileTree.scan(tmp_path),
        TarMembers(members),
        ParquetRows([tmp_path / "a.parquet", tmp_path / "b.parquet"], "image"),
        ArrayRows(np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "x.npy"),
    ]
    expected = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    rows = torch.tensor([5, 0, 3, 2])
    for source in sources:
        images = FileImages(source, Preprocess(16), rows, target=torch.tensor([1, 2, 3, 4]), caption=list("abcd"))
        batch = images.__getitems__([3, 0])
        assert torch.equal(batch["image"], expected[rows[[3, 0]]]) and batch["index"].tolist() == [3, 0]
        assert batch["target"].tolist() == [4, 1] and batch["caption"] == ["d", "a"]
        assert torch.equal(images[1]["image"], expected[0]) and len(images) == 4
        assert all(str(tmp_path) in source.name(row) for row in range(6))
        assert len({source.entry(row) for row in range(6)}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_give_the_same_batches(tree, workers):
    images = images_of(tree)
    loader = DataLoader(images, 3, num_workers=workers, collate_fn=as_is)
    batches = list(loader)
    assert torch.equal(torch.cat([b["image"] for b in batches]), images.__getitems__(list(range(7)))["image"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone"])
def test_bad_image_is_named_in_one_line(tree, workers, damage):
    images = images_of(tree)
    path = tree / "4.png"
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes({"cut": content[:200], "empty": b"", "text": b"no"}[damage])
    with pytest.raises(UnreadableImage) as caught:
        list(DataLoader(images, 3, num_workers=workers, collate_fn=as_is))
    message = str(caught.value)
    assert str(path) in message and "on_bad_image: skip" in message and "\n" not in message
    assert message.startswith("image '") and isinstance(caught.value, VLMQError)
    unknown = damage in ("empty", "text")  # Pillow would say where in memory the bytes were
    assert ("(no image that is known here)" in message) == unknown and "BytesIO" not in message


def test_bad_images_are_skipped_with_a_warning_each(tree, caplog):
    for name in ("0.png", "4.png", "5.png"):
        (tree / name).write_bytes(b"no image")
    images = images_of(tree, on_bad_image="skip")
    batches = list(DataLoader(images, 1, collate_fn=as_is))
    assert torch.cat([b["index"] for b in batches]).tolist() == [1, 2, 3, 6]
    assert all(b["image"].shape == (len(b["index"]), 3, 16, 16) for b in batches)
    assert all(name in caplog.text for name in ("0.png", "4.png", "5.png")) and "1.png" not in caplog.text
    decoded = decode_all(images_of(tree, on_bad_image="skip", caption=list("abcdefg")), 0, "pairs")
    assert len(decoded) == 4 and decoded.columns["caption"] == ["b", "c", "d", "g"]
    assert "3 of 7 pairs" in caplog.text


def test_nothing_readable_is_an_error_even_when_skipping(tree):
    for path in tree.iterdir():
        path.write_bytes(b"no image")
    assert "none of the 7 pairs" in refused(lambda: decode_all(images_of(tree, on_bad_image="skip"), 0, "pairs"))


class TestDigest:
    def test_follows_the_listing_not_the_place(self, tmp_path, tree):
        first = images_of(tree).digest()
        assert images_of(tree).digest() == first
        moved = tree.rename(tmp_path / "moved")
        assert images_of(moved).digest() == first

    def test_changes_with_all_that_decides_a_batch(self, tree, rng):
        seen = {
            images_of(tree).digest(),
            images_of(tree, size=17).digest(),
            images_of(tree, on_bad_image="skip").digest(),
        }
        seen.add(images_of(tree).subset(torch.arange(6)).digest())
        seen.add(images_of(tree).subset(torch.tensor([1, 0, 2, 3, 4, 5, 6])).digest())
        seen |= {images_of(tree, target=torch.arange(7) + k).digest() for k in range(2)}
        source = FileTree.scan(tree)
        seen.add(FileImages(source, Preprocess(16, border=1), torch.arange(7)).digest())
        status = os.stat(tree / "3.png")
        os.utime(tree / "3.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        seen.add(images_of(tree).digest())
        (tree / "3.png").rename(tree / "33.png")
        seen.add(images_of(tree).digest())
        write_image(tree / "33.png", rng, 21, 30)
        seen.add(images_of(tree).digest())
        assert len(seen) == 11

    def test_parts_of_one_array_differ(self, tmp_path, rng):
        np.save(tmp_path / "x.npy", rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8))
        source = ArrayRows(np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "x.npy")
        halves = [FileImages(source, Preprocess(32), rows).digest() for rows in torch.arange(10).split(5)]
        assert halves[0] != halves[1]

    def test_reads_no_image(self, tree, monkeypatch):
        images = images_of(tree)
        monkeypatch.setattr(FileTree, "encoded", lambda *_: pytest.fail("an image was read"))
        assert images.digest()


def test_drawn_subset_is_seeded_and_in_order(tmp_path, rng):
    write_tree(tmp_path, rng, [f"{k:02}.png" for k in range(30)])
    source = FileTree.scan(tmp_path)

    def rows(seed, n=10):
        how = reading(tmp_path, max_images=n, seed=seed)
        return how.eval_set("x", "id", source, torch.arange(30)).images

    first = rows(0)
    assert len(first) == 10 and first.rows.tolist() == sorted(first.rows.tolist())
    assert torch.equal(first.columns["target"], first.rows)  # labels stay with their images
    assert torch.equal(rows(0).rows, first.rows) and not torch.equal(rows(1).rows, first.rows)
    assert len(rows(0, n=31)) == 30


class TestBadParquet:
    def test_is_refused(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "x.parquet"
        refused(lambda: ParquetRows([path], "image"), path, "missing")
        path.write_bytes(b"PAR1 and nothing else")
        refused(lambda: ParquetRows([path], "image"), path, "damaged")
        pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), path)
        refused(lambda: ParquetRows([path], "image"), "lacks the column image", "picture")
        refused(lambda: ParquetRows([path], "label"), "column label", "int64")

    def test_empty_cell_is_a_bad_image(self, tmp_path, rng):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [encode(random_pixels(rng)), None]}), path)
        images = FileImages(ParquetRows([path], "image"), Preprocess(8), torch.arange(2))
        assert "row 1" in refused(lambda: images.__getitems__([0, 1]))
