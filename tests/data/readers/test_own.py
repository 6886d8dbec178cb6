"""Data sets of one's own: class folders, image lists, Parquet; and real images where they are at hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases.files import encode, names_and_targets, random_pixels, reading, refused, shared_file, write_tree
from PIL import Image

from lightning_vlmq.data.readers import Folder, ImageList, Parquet
from lightning_vlmq.data.readers.names import CIFAR10, IMAGENET, resolve_class_names


@pytest.fixture
def rng():
    return np.random.default_rng()


class TestFolder:
    def test_sorted_folders_are_the_classes(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, ["cat/b.png", "cat/a.jpg", "an owl/c.webp", "dog/deep/er/d.JPG"])
        (s,) = Folder("mine", "mine", "id").read(reading(tmp_path))
        assert s.class_names == ("an owl", "cat", "dog") and s.templates
        assert names_and_targets(s) == (["c.webp", "a.jpg", "b.png", "d.JPG"], [0, 1, 1, 2])
        (s,) = Folder("mine", "mine", "shift", class_names=["owl", "tabby", "pug"]).read(reading(tmp_path))
        assert s.class_names == ("owl", "tabby", "pug") and s.templates is None

    def test_ood_takes_any_image(self, tmp_path, rng):
        write_tree(tmp_path / "any", rng, ["z.png", "x/a.png"])
        (s,) = Folder("any", "any", "far_ood").read(reading(tmp_path))
        assert names_and_targets(s) == (["a.png", "z.png"], [-1, -1])

    def test_gone_wrong(self, tmp_path, rng):
        refused(lambda: Folder("mine", "mine", "id").read(reading(tmp_path)), tmp_path / "mine")
        (tmp_path / "mine").mkdir()
        refused(lambda: Folder("mine", "mine", "id").read(reading(tmp_path)), "no class folders")
        refused(lambda: Folder("mine", "mine", "near_ood").read(reading(tmp_path)), "'mine' (near_ood) is empty")
        write_tree(tmp_path / "mine", rng, ["cat/a.png", "dog/b.png"])
        refused(
            lambda: Folder("mine", "m", "id", class_names=["x", "y", "z"]).read(reading(tmp_path)), "2 class folders"
        )
        refused(lambda: Folder("mine", "m", "id", class_names="imagnet").read(reading(tmp_path)), "imagnet", "imagenet")
        refused(lambda: Folder("mine", "m", "id", templates=["a photo"]).read(reading(tmp_path)), "'a photo'")
        refused(lambda: Folder("mine", "m", "idd").read(reading(tmp_path)), "role 'idd'", "did you mean id")
        refused(lambda: Folder("mine", "m", "id", expected=3).read(reading(tmp_path)), "has 2 images", "3")

    def test_class_names_from_a_file(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, ["n1/a.png", "n2/b.png"])
        (tmp_path / "names.txt").write_text("tench\n\ngoldfish\n")
        (s,) = Folder("mine", "m", "id", class_names=str(tmp_path / "names.txt")).read(reading(tmp_path))
        assert s.class_names == ("tench", "goldfish")


class TestFilesOfNames:
    def names(self, path, lines):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return resolve_class_names(str(path))

    @pytest.mark.parametrize(
        "lines",
        [
            ("0 tench", "1 goldfish"),
            ("1 tench", "2 goldfish"),
            ("0\ttench", "1\tgoldfish"),
            ("0: tench", "1: goldfish"),
            ("0,tench", "1,goldfish"),
            ("1. tench", "2. goldfish"),
            ("1) tench", "2) goldfish"),
            ("000 tench", "001 goldfish"),
            ("n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus"),
            ("n01440764,tench", "n01443537,goldfish"),
            ("n01440764", "n01443537"),
        ],
    )
    def test_with_numbers_before_the_names_are_no_names(self, tmp_path, lines):
        path = tmp_path / "names.txt"
        refused(
            lambda: self.names(path, lines), path, "one name per line and nothing else", f"first line is '{lines[0]}'"
        )

    @pytest.mark.parametrize(
        "lines",
        [
            ("2 of clubs", "3 of clubs", "10 of clubs"),
            ("1 dollar", "2 dollars", "5 dollars"),
            ("2 doors", "1 door"),
            ("0", "1", "2"),
            ("1st", "2nd", "3rd"),
            ("1-dollar note", "2-dollar note"),
            ("747 400", "737 200"),
            ("1 cat", "dog"),
            ("n1", "n2"),
            ("n0144076 tench", "n0144353 goldfish"),
            ("a, b", "c: d"),
            ("１ 猫", "犬"),
        ],
    )
    def test_names_that_begin_with_numbers_of_their_own_are_names(self, tmp_path, lines):
        assert self.names(tmp_path / "names.txt", lines) == lines

    @pytest.mark.parametrize(
        ("suffix", "line"),
        [
            (".json", '["tench",'),
            (".JSON", "["),
            (".yaml", "- tench"),
            (".yml", "- t"),
            (".csv", "t,0"),
            (".tsv", "0\tt"),
        ],
    )
    def test_tables_are_no_list_of_names(self, tmp_path, suffix, line):
        path = tmp_path / f"names{suffix}"
        kind = suffix[1:].upper()
        refused(lambda: self.names(path, [line, "goldfish"]), path, f"are {kind}, its first line is '{line}'", "a list")
        refused(lambda: self.names(path, []), "at least 2 names")
        assert self.names(tmp_path / f"names{suffix}.txt", ["tench", "goldfish"]) == ("tench", "goldfish")

    @pytest.mark.parametrize("suffix", ["", ".txt", ".names", ".lst", ".csv", ".tsv"])
    def test_plain_text_of_any_suffix(self, tmp_path, suffix):
        assert self.names(tmp_path / f"names{suffix}", ["tench", "goldfish"]) == ("tench", "goldfish")

    def test_first_lines_are_shown_in_part(self, tmp_path):
        path = tmp_path / "names.json"
        message = refused(lambda: self.names(path, ["x" * 2000]), path)
        assert "x" * 60 in message and "x" * 61 not in message

    @pytest.mark.parametrize("blank", ["", " ", "\t", "\u00a0"])
    def test_blank_names(self, tmp_path, rng, blank):
        write_tree(tmp_path / "mine", rng, ["cat/a.png", "dog/b.png"])

        def read(names):
            return Folder("mine", "m", "id", class_names=names).read(reading(tmp_path))[0].class_names

        refused(lambda: read(["cat", blank]), "class name 2 of 2 is blank", "name each class")
        refused(lambda: read({"cat": blank, "dog": "a dog"}), "class name 1 of 2 is blank", "name each class")
        assert read(["-", " a dog"]) == ("-", " a dog") and read({"cat": "x", "dog": "0"}) == ("x", "0")


class TestImageList:
    def test_lines_in_order_with_paths_from_the_lists_folder_or_another(self, tmp_path, rng):
        write_tree(tmp_path / "images", rng, ["a b.png", "c.png"])
        (tmp_path / "list.txt").write_text("images/c.png 1\nimages/a b.png 0\n")
        (s,) = ImageList("list.txt", "l", "shift").read(reading(tmp_path))
        assert names_and_targets(s) == (["c.png", "a b.png"], [1, 0]) and s.class_names is None
        (tmp_path / "list.txt").write_text("c.png 1\n")
        (s,) = ImageList("list.txt", "l", "id", images="images", class_names="cifar10").read(reading(tmp_path))
        assert names_and_targets(s) == (["c.png"], [1]) and s.class_names == CIFAR10 and s.templates

    def test_gone_wrong(self, tmp_path, rng):
        (tmp_path / "list.txt").write_text("c.png 1\nd.png\n")
        refused(lambda: ImageList("list.txt", "l", "id").read(reading(tmp_path)), "line 2", "d.png")
        (tmp_path / "list.txt").write_text("c.png 1\n")
        refused(lambda: ImageList("list.txt", "l", "id").read(reading(tmp_path)), "'c.png'")


class TestParquet:
    def write(self, path, rng, n=6, **columns):
        files = [encode(random_pixels(rng, 16, 16)) for _ in range(n)]
        path.parent.mkdir(exist_ok=True, parents=True)
        pq.write_table(pa.table({"image": files, **columns}), path, row_group_size=4)
        return files

    def test_numbers_and_names(self, tmp_path, rng):
        self.write(tmp_path / "x.parquet", rng, label=[2, 0, 1, 1, 0, 2], name=["c", "a", "b", "b", "a", "c"])
        (s,) = Parquet("x.parquet", "x", "id", class_name="name").read(reading(tmp_path))
        assert s.class_names == ("a", "b", "c") and s.images.columns["target"].tolist() == [2, 0, 1, 1, 0, 2]
        (s,) = Parquet("x.parquet", "x", "shift").read(reading(tmp_path))
        assert s.class_names is None
        (s,) = Parquet("x.parquet", "x", "id", label="name").read(reading(tmp_path))
        assert s.class_names == ("a", "b", "c") and s.images.columns["target"].tolist() == [2, 0, 1, 1, 0, 2]
        (s,) = Parquet("x.parquet", "x", "far_ood", label="none").read(reading(tmp_path))
        assert s.images.columns["target"].tolist() == [-1] * 6

    def test_a_folder_of_shards(self, tmp_path, rng):
        self.write(tmp_path / "set" / "b.parquet", rng, 2, label=[1, 0])
        files = self.write(tmp_path / "set" / "a.parquet", rng, 5, label=[0, 1, 0, 1, 1])
        (s,) = Parquet("set", "x", "id").read(reading(tmp_path))
        assert s.images.columns["target"].tolist() == [0, 1, 0, 1, 1, 1, 0]
        assert s.images.source.encoded(4) == files[4] and "b.parquet, row 1" in s.images.source.name(6)

    def test_gone_wrong(self, tmp_path, rng):
        refused(lambda: Parquet("x.parquet", "x", "id").read(reading(tmp_path)), "x.parquet", "does not exist")
        (tmp_path / "empty").mkdir()
        refused(lambda: Parquet("empty", "x", "id").read(reading(tmp_path)), "no Parquet file")
        self.write(tmp_path / "x.parquet", rng, 3, label=[0, 1, 1], name=["a", "b", "c"])
        how = Parquet("x.parquet", "x", "id", class_name="name")
        refused(lambda: how.read(reading(tmp_path)), "label 1 has several names", "x.parquet")
        self.write(tmp_path / "x.parquet", rng, 2, label=[0, 2], name=["a", "c"])
        refused(lambda: how.read(reading(tmp_path)), "labels are not 0..1")
        refused(lambda: Parquet("x.parquet", "x", "id", label="y").read(reading(tmp_path)), "lacks the column y")


def test_real_cifar10_images():
    path = shared_file("cifar10-test.parquet")
    how = Parquet(path.name, "cifar10", "id", class_name="class_name", expected=10_000)
    (s,) = how.read(reading(path.parent, size=32))
    assert s.class_names == CIFAR10
    assert torch.equal(s.images.columns["target"].bincount(), torch.full((10,), 1000))
    batch = s.images.__getitems__([9999, 0])
    raw = pq.read_table(path)["image"]
    for row, image in zip((9999, 0), batch["image"]):
        import io

        decoded = np.array(Image.open(io.BytesIO(raw[row].as_py())).convert("RGB"))
        assert torch.equal(image, torch.from_numpy(decoded).permute(2, 0, 1))


def test_real_imagenet_images_by_wnid():
    path = shared_file("imagenet-sample-224.parquet")
    how = Parquet(path.name, "sample", "id", label="wnid", class_name="class_name", expected=1000)
    (s,) = how.read(reading(path.parent, size=224))
    assert len(s.class_names) == 1000 and s.images[0]["image"].shape == (3, 224, 224)
    target = s.images.columns["target"]
    assert sorted(target.tolist()) == list(range(1000))  # one a class: sorted wnids are ImageNet's labels
    assert s.class_names[0] == IMAGENET[0] == "tench"
