"""Image-caption pairs from folders, tables and shards."""

import json
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases.files import encode, random_pixels, reading, refused, write_tar, write_tree

from lightning_vlmq.data.readers import FolderPairs, ShardPairs, TablePairs


@pytest.fixture
def rng():
    return np.random.default_rng()


def captions(images):
    return images.columns["caption"]


def pixels_agree(images, expected):
    return torch.equal(images.__getitems__(list(range(len(images))))["image"], expected)


def draws_differ(read):
    """A seed gives the same pairs again and another seed others; returns the captions of the first."""
    first = captions(read(0))
    assert captions(read(0)) == first
    assert any(captions(read(seed)) != first for seed in range(1, 6))
    return first


class TestFolder:
    def write(self, tmp_path, rng, n=8):
        write_tree(tmp_path / "pairs", rng, [f"{k % 2}/{k}.jpg" for k in range(n)])
        for k in range(n):
            (tmp_path / "pairs" / f"{k % 2}/{k}.txt").write_text(f" caption {k}\n")

    def test_caption_lies_beside_its_image(self, tmp_path, rng):
        self.write(tmp_path, rng)
        images = FolderPairs("pairs").read(reading(tmp_path), 5, None)
        assert captions(images) == [f"caption {k}" for k in (0, 2, 4, 6, 1)]
        assert [images.source.path(row)[2:3] for row in images.rows.tolist()] == list("02461")
        assert len(draws_differ(lambda seed: FolderPairs("pairs").read(reading(tmp_path), 4, seed))) == 4

    def test_gone_wrong(self, tmp_path, rng):
        self.write(tmp_path, rng)
        refused(lambda: FolderPairs("pairs").read(reading(tmp_path), 9, None), "holds 8", "9 are asked for")
        (tmp_path / "pairs/1/3.txt").write_text(" \n")
        refused(lambda: FolderPairs("pairs").read(reading(tmp_path), 8, None), "1 of 8 captions", "empty")
        (tmp_path / "pairs/1/3.txt").unlink()
        refused(lambda: FolderPairs("pairs").read(reading(tmp_path), 8, None), "1 of 8", "3.txt")
        refused(lambda: FolderPairs("none").read(reading(tmp_path), 8, None), "none")

    def test_images_that_share_a_caption(self, tmp_path, rng):
        self.write(tmp_path, rng)
        write_tree(tmp_path / "pairs", rng, ["0/4.png"])  # beside 0/4.jpg
        caption = tmp_path / "pairs" / "0" / "4.txt"
        refused(
            lambda: FolderPairs("pairs").read(reading(tmp_path), 9, None), tmp_path, f"caption '{caption}'", "keep one"
        )
        assert len(FolderPairs("pairs").read(reading(tmp_path), 2, None)) == 2  # neither is among these
        (tmp_path / "pairs" / "0" / "4.png").rename(tmp_path / "pairs" / "1" / "4.png")
        (tmp_path / "pairs" / "1" / "4.txt").write_text("caption 4\n")  # the same words in a file of its own
        assert captions(FolderPairs("pairs").read(reading(tmp_path), 9, None)).count("caption 4") == 2


class TestTable:
    @pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
    def test_paths(self, tmp_path, rng, suffix):
        write_tree(tmp_path / "img", rng, [f"{k}.png" for k in range(5)])
        table = pd.DataFrame(
            {"file": [f"{k}.png" for k in (3, 1, 4, 0, 2)], "text": [f"no. {k}" for k in (3, 1, 4, 0, 2)]}
        )
        path = tmp_path / f"t.{suffix}"
        if suffix == "parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
        how = TablePairs(path.name, image="file", caption="text", images="img")
        images = how.read(reading(tmp_path), 3, None)
        assert captions(images) == ["no. 3", "no. 1", "no. 4"]
        assert [images.source.path(row) for row in images.rows.tolist()] == ["3.png", "1.png", "4.png"]
        assert len(draws_differ(lambda seed: how.read(reading(tmp_path), 3, seed))) == 3

    def test_bytes_in_parquet(self, tmp_path, rng):
        pixels = [random_pixels(rng, 16, 16) for _ in range(6)]
        table = pa.table({"image": [encode(p) for p in pixels], "caption": [str(k) for k in range(6)]})
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
        how = TablePairs("t.parquet")
        first = draws_differ(lambda seed: how.read(reading(tmp_path), 3, seed))
        images = how.read(reading(tmp_path), 3, 0)
        expected = torch.from_numpy(np.stack([pixels[int(k)] for k in first])).permute(0, 3, 1, 2)
        assert pixels_agree(images, expected)
        assert captions(how.read(reading(tmp_path), 2, None)) == ["0", "1"]

    def test_gone_wrong(self, tmp_path, rng):
        refused(lambda: TablePairs("t.csv").read(reading(tmp_path), 1, None), "t.csv")
        (tmp_path / "t.csv").write_text("image,text\na.png,x\n")
        refused(lambda: TablePairs("t.csv").read(reading(tmp_path), 1, None), "image, caption")
        (tmp_path / "t.csv").write_text("image,caption\na.png,x\n")
        refused(lambda: TablePairs("t.csv").read(reading(tmp_path), 1, None), "'a.png'")
        write_tree(tmp_path, rng, ["a.png"])
        (tmp_path / "t.csv").write_text("image,caption\na.png,\n")
        refused(lambda: TablePairs("t.csv").read(reading(tmp_path), 1, None), "captions", "empty")
        (tmp_path / "t.parquet").write_bytes(b"nothing")
        refused(lambda: TablePairs("t.parquet").read(reading(tmp_path), 1, None), "t.parquet", "damaged")


class TestShards:
    def write(self, tmp_path, rng, shards=3, each=4):
        """As img2dataset writes them: key.jpg, key.json, key.txt, members of a sample in the order of their names."""
        pixels = {}
        for shard in range(shards):
            members = []
            for k in range(each):
                key = f"{shard:05}{k:04}"
                pixels[key] = random_pixels(rng, 16, 16)
                members.append((f"{key}.jpg", encode(pixels[key])))  # PNG bytes: exact, and decoders go by content
                members.append((f"{key}.json", json.dumps({"key": key}).encode()))
                members.append((f"{key}.txt", f"caption {key}".encode()))
            write_tar(tmp_path / "cc3m" / f"{shard:05}.tar", members)
            (tmp_path / "cc3m" / f"{shard:05}_stats.json").write_text("{}")
        return pixels

    def test_first_pairs_come_from_the_first_shards(self, tmp_path, rng):
        pixels = self.write(tmp_path, rng)
        images = ShardPairs("cc3m").read(reading(tmp_path), 6, None)
        keys = list(pixels)[:6]
        assert captions(images) == [f"caption {key}" for key in keys]
        assert pixels_agree(images, torch.from_numpy(np.stack([pixels[k] for k in keys])).permute(0, 3, 1, 2))
        assert "00001.tar:000010001.jpg" in images.source.name(5)

    def test_draw_is_seeded_and_looks_into_as_many_shards_as_it_may(self, tmp_path, rng):
        pixels = self.write(tmp_path, rng)
        first = draws_differ(lambda seed: ShardPairs("cc3m").read(reading(tmp_path), 5, seed))
        assert len(set(first)) == 5
        images = ShardPairs("cc3m", max_shards=1).read(reading(tmp_path), 4, 7)
        assert len({caption[8:13] for caption in captions(images)}) == 1
        keys = [caption[8:] for caption in captions(images)]
        assert pixels_agree(images, torch.from_numpy(np.stack([pixels[k] for k in keys])).permute(0, 3, 1, 2))
        refused(lambda: ShardPairs("cc3m", max_shards=1).read(reading(tmp_path), 5, 7), "holds 4")

    def test_first_pairs_leave_later_shards_closed(self, tmp_path, rng):
        self.write(tmp_path, rng)
        (tmp_path / "cc3m" / "00002.tar").write_bytes(b"damaged")
        assert len(ShardPairs("cc3m").read(reading(tmp_path), 8, None)) == 8
        refused(lambda: ShardPairs("cc3m").read(reading(tmp_path), 9, None), "00002.tar", "damaged")

    def test_incomplete_samples_are_no_pairs(self, tmp_path, rng):
        image = encode(random_pixels(rng))
        members = [("a.jpg", image), ("b.txt", b"lonely"), ("c.png", image), ("c.txt", b"pair"), ("d/c.jpg", image)]
        write_tar(tmp_path / "cc3m" / "0.tar", members)
        assert captions(ShardPairs("cc3m").read(reading(tmp_path), 1, None)) == ["pair"]
        refused(lambda: ShardPairs("cc3m").read(reading(tmp_path), 2, None), "holds 1")

    @pytest.mark.parametrize(
        "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
    )
    def test_members_that_are_no_plain_files_are_no_parts_of_pairs(self, tmp_path, rng, kind):
        path = tmp_path / "cc3m" / "0.tar"
        write_tar(path, [("a.jpg", encode(random_pixels(rng))), ("a.txt", b"pair"), ("b.txt", b"lonely")])
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("b.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        assert captions(ShardPairs("cc3m").read(reading(tmp_path), 1, None)) == ["pair"]
        refused(lambda: ShardPairs("cc3m").read(reading(tmp_path), 2, None), "holds 1", "0.tar")

    @pytest.mark.parametrize("caption", ["json", "JSON", "meta.json"])
    def test_json_is_no_caption(self, tmp_path, rng, caption):
        self.write(tmp_path, rng)
        refused(lambda: ShardPairs("cc3m", caption=caption).read(reading(tmp_path), 1, None), "JSON", "suffix", "txt")

    @pytest.mark.parametrize("caption", ["json.txt", "caption", "TXT"])
    def test_other_suffixes_of_captions(self, tmp_path, rng, caption):
        members = [("a.jpg", encode(random_pixels(rng))), (f"a.{caption}", b"words"), ("a.json", b"{}")]
        write_tar(tmp_path / "cc3m" / "0.tar", members)
        assert captions(ShardPairs("cc3m", caption=caption).read(reading(tmp_path), 1, None)) == ["words"]

    @pytest.mark.parametrize("pattern", ["", "/tmp/*.tar", "/"])
    def test_patterns_that_are_none(self, tmp_path, rng, pattern):
        self.write(tmp_path, rng)
        how = ShardPairs("cc3m", shards=pattern)
        refused(lambda: how.read(reading(tmp_path), 1, None), f"'{pattern}' is no pattern", tmp_path / "cc3m", "*.tar")

    @pytest.mark.parametrize("pattern", ["00000.tar", "0000[0-1].tar", "../cc3m/*.tar", "**/*.tar"])
    def test_patterns(self, tmp_path, rng, pattern):
        self.write(tmp_path, rng)
        first = captions(ShardPairs("cc3m", shards=pattern).read(reading(tmp_path), 1, None))
        assert first == ["caption 000000000"]

    def test_links(self, tmp_path, rng):
        self.write(tmp_path, rng)
        (tmp_path / "cc3m" / "00002.tar").rename(tmp_path / "elsewhere.tar")
        link = tmp_path / "cc3m" / "00002.tar"
        link.symlink_to(tmp_path / "elsewhere.tar")
        for name in ("notes", "00003.tar.md5", "._00004.tar"):  # lead nowhere, and are asked for by nobody
            (tmp_path / "cc3m" / name).symlink_to(tmp_path / "gone")
        assert len(ShardPairs("cc3m").read(reading(tmp_path), 12, None)) == 12
        (tmp_path / "elsewhere.tar").unlink()
        refused(
            lambda: ShardPairs("cc3m").read(reading(tmp_path), 1, None),
            f"'{link}' is a link that leads nowhere",
            "repair",
        )
        assert len(ShardPairs("cc3m", shards="0000[01].tar").read(reading(tmp_path), 8, None)) == 8

    def test_gone_wrong(self, tmp_path, rng):
        (tmp_path / "cc3m").mkdir()
        refused(lambda: ShardPairs("cc3m").read(reading(tmp_path), 1, None), "no shards '*.tar'")
        self.write(tmp_path, rng, shards=1)
        content = (tmp_path / "cc3m" / "00000.tar").read_bytes()
        (tmp_path / "cc3m" / "00000.tar").write_bytes(content[:1000])
        refused(lambda: ShardPairs("cc3m").read(reading(tmp_path), 4, None), "00000.tar", "damaged")
