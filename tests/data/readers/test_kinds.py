"""What people's folders hold beside images and plain names: each read as it is meant, or refused by its place."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases.files import encode, names_and_targets, random_pixels, reading, refused, write_image, write_tar, write_tree

from lightning_vlmq.data import FileData
from lightning_vlmq.data.readers import CounterAnimal, Folder, FolderPairs, ImageList, Parquet, ShardPairs, TablePairs


@pytest.fixture
def rng():
    return np.random.default_rng()


def folder(root, **kwargs):
    (s,) = Folder("mine", "mine", "id", **kwargs).read(reading(root))
    return s


class TestNumbers:
    NAMES = tuple(f"name{k}" for k in range(12))

    @pytest.fixture
    def root(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, [f"{k}/{k}.png" for k in range(12)])
        return tmp_path

    def test_folders_are_in_the_order_of_the_numbers(self, root, caplog):
        s = folder(root, class_names=list(self.NAMES))
        assert dict(zip(*names_and_targets(s))) == {f"{k}.png": k for k in range(12)}
        assert s.class_names == self.NAMES
        assert "'0' is 'name0', '1' is 'name1', …, '11' is 'name11'" in caplog.text
        assert folder(root).class_names == tuple(map(str, range(12)))

    def test_names_of_the_data_module_follow(self, root):
        data = FileData([Folder("mine", "mine", "id")], str(root), class_names=list(self.NAMES), image_size=8)
        data.setup()
        assert tuple(data.class_names) == self.NAMES
        by_class = {str(k): f"n{k}" for k in range(12)}
        data = FileData([Folder("mine", "mine", "id")], str(root), class_names=by_class, image_size=8)
        data.setup()
        assert data.class_names[10] == "n10"

    def test_numbers_within_names_need_a_mapping(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, [f"class_{k}/{k}.png" for k in (1, 2, 10)])
        assert folder(tmp_path).class_names == ("class_1", "class_10", "class_2")  # plain: each goes by its own name
        refused(lambda: folder(tmp_path, class_names=["a", "b", "c"]), "'class_10' or 'class_2'", "mapping")
        s = folder(tmp_path, class_names={"class_1": "a", "class_2": "b", "class_10": "c"})
        assert dict(zip(*names_and_targets(s))) == {"1.png": 0, "10.png": 1, "2.png": 2}
        assert s.class_names == ("a", "c", "b")
        refused(lambda: folder(tmp_path, class_names={"class_1": "a", "class_2": "b"}), "'class_10' has no name")
        refused(lambda: folder(tmp_path, class_names={"class_3": "a"}), "class_names have to name each")
        data = FileData([Folder("mine", "mine", "id")], str(tmp_path), class_names=["a", "b", "c"], image_size=8)
        refused(data.setup, "the id set 'mine'", "mapping")

    def test_the_same_number_twice(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, ["1/a.png", "01/b.png"])
        refused(lambda: folder(tmp_path), "'01' and '1'", "same number")

    def test_padded_numbers(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, ["010/a.png", "002/b.png"])
        assert folder(tmp_path).class_names == ("002", "010")


class TestEmptyClasses:
    def test_are_refused_with_what_is_in_them(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, ["cat/a.png", "dog/b.png"])
        (tmp_path / "mine" / "fox").mkdir()
        refused(lambda: folder(tmp_path), tmp_path / "mine" / "fox", "it is empty")
        (tmp_path / "mine" / "fox" / "deeper").mkdir()
        (tmp_path / "mine" / "fox" / "deeper" / "a.gif").write_bytes(b"GIF89a")
        refused(lambda: folder(tmp_path), "fox", "1 .gif")
        write_image(tmp_path / "mine" / "fox" / "deeper" / "x.png", rng)
        assert folder(tmp_path).class_names == ("cat", "dog", "fox")

    def test_images_of_other_kinds_are_told(self, tmp_path, rng, caplog):
        write_tree(tmp_path / "mine", rng, ["cat/a.png"])
        (tmp_path / "mine" / "cat" / "b.gif").write_bytes(b"GIF89a")
        (tmp_path / "mine" / "cat" / "notes.txt").write_text("of no concern")
        assert names_and_targets(folder(tmp_path)) == (["a.png"], [0])
        (record,) = caplog.records
        assert "1 images" in record.getMessage() and "cat/b.gif" in record.getMessage()

    def test_images_without_a_known_suffix_are_told_whatever_the_system_knows(self, tmp_path, rng, caplog, monkeypatch):
        monkeypatch.setattr("mimetypes.guess_type", lambda path: (None, None))
        write_tree(tmp_path / "mine", rng, ["cat/a.png"])
        for name in ("b", "c.tga", "d.frame"):
            (tmp_path / "mine" / "cat" / name).write_bytes((tmp_path / "mine" / "cat" / "a.png").read_bytes())
        for name in ("e.dng", "notes", "thumbs.idx", "f.txt"):
            (tmp_path / "mine" / "cat" / name).write_bytes(b"of no concern")
        assert names_and_targets(folder(tmp_path)) == (["a.png"], [0])
        (record,) = caplog.records
        said = record.getMessage()
        assert "4 images" in said and ".dng, .frame, .tga, files without a suffix are not read" in said

    def test_when_unreadable_images_are_left_out(self, tmp_path, rng):
        write_tree(tmp_path / "mine", rng, ["cat/a.png", "dog/b.png", "dog/c.png"])
        how = reading(tmp_path, on_bad_image="skip")
        (tmp_path / "mine" / "dog" / "b.png").write_bytes(b"no image")
        assert len(Folder("mine", "m", "id").read(how)[0].images) == 3  # one of the class can be read
        (tmp_path / "mine" / "dog" / "c.png").write_bytes(b"")
        refused(lambda: Folder("mine", "m", "id").read(how), tmp_path / "mine" / "dog", "can be read")


def test_what_systems_leave_is_no_data(tmp_path, rng, caplog):
    write_tree(tmp_path / "mine", rng, ["cat/a.png", "dog/b.png"])
    litter = ["__MACOSX/cat/._a.png", ".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/._b.png", ".git/x.png"]
    for path in [*litter, "cat/.ipynb_checkpoints/a-checkpoint.png", "@eaDir/x.png", "dog/desktop.ini"]:
        (tmp_path / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / path).write_bytes(b"litter")
    assert names_and_targets(folder(tmp_path)) == (["a.png", "b.png"], [0, 1])
    (s,) = Folder("mine", "m", "far_ood").read(reading(tmp_path))
    assert names_and_targets(s)[0] == ["a.png", "b.png"] and not caplog.records
    members = [("__MACOSX/._1.jpg", b"x"), ("1.jpg", encode(random_pixels(rng))), ("._1.txt", b"x"), ("1.txt", b"one")]
    write_tar(tmp_path / "web" / "0.tar", members)
    (tmp_path / "web" / "._0.tar").write_bytes(b"x")
    assert ShardPairs("web").read(reading(tmp_path), 1, None).columns["caption"] == ["one"]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": [encode(random_pixels(rng))], "label": [0]}), tmp_path / "set" / "a.parquet")
    (tmp_path / "set" / "._a.parquet").write_bytes(b"x")
    assert len(Parquet("set", "x", "shift").read(reading(tmp_path))[0].images) == 1


def test_links_that_lead_nowhere_or_round(tmp_path, rng):
    write_tree(tmp_path / "mine", rng, ["cat/a.png"])
    os.symlink(tmp_path / "gone.png", tmp_path / "mine" / "cat" / "b.png")
    refused(lambda: folder(tmp_path), tmp_path / "mine" / "cat" / "b.png", "link")
    (tmp_path / "mine" / "cat" / "b.png").unlink()
    os.symlink(tmp_path / "mine", tmp_path / "mine" / "cat" / "round")
    refused(lambda: folder(tmp_path), "round", "remove the link")


def test_links_to_folders_and_notes(tmp_path, rng):
    """A link that leads nowhere may have led to a folder of images, whatever it is called; one that leads somewhere is what is there."""
    write_tree(tmp_path / "mine", rng, ["cat/a.png"])
    write_tree(tmp_path / "other", rng, ["b.png"])
    (tmp_path / "notes.txt").write_text("of no concern")
    (tmp_path / "mine" / "cat" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "mine" / "cat" / "notes.txt").symlink_to(tmp_path / "notes.txt")
    (tmp_path / "mine" / "cat" / ".lock").symlink_to("nobody@nowhere")  # as editors leave them
    assert names_and_targets(folder(tmp_path)) == (["a.png", "b.png"], [0, 0])
    (tmp_path / "other").rename(tmp_path / "moved")
    refused(lambda: folder(tmp_path), tmp_path / "mine" / "cat" / "more", "where its link leads")


def test_a_folder_of_parquet_files_with_a_link_that_leads_nowhere(tmp_path, rng):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": [encode(random_pixels(rng))], "label": [0]}), tmp_path / "set" / "a.parquet")
    (tmp_path / "set" / "b.parquet.lock").symlink_to(tmp_path / "gone")
    assert len(Parquet("set", "x", "shift").read(reading(tmp_path))[0].images) == 1
    link = tmp_path / "set" / "b.parquet"
    link.symlink_to(tmp_path / "gone")
    refused(lambda: Parquet("set", "x", "shift").read(reading(tmp_path)), f"'{link}' is a link that leads nowhere")


@pytest.mark.parametrize("reader", [Folder("mine", "mine", "id"), CounterAnimal("mine", expected=None)])
def test_names_of_folders_that_are_no_text(tmp_path, rng, reader):
    odd, plain = os.fsencode(tmp_path / "mine") + b"/1 caf\xe9", tmp_path / "mine" / "1 café"
    write_tree(plain, rng, ["common-a/a.png", "counter-b/b.png"])
    assert sum(len(s.images) for s in reader.read(reading(tmp_path))) == 2
    try:
        os.rename(plain, odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    refused(lambda: reader.read(reading(tmp_path)), r"folder b'1 caf\xe9'", tmp_path / "mine", "not UTF-8; rename it")


class TestLists:
    def read(self, root, content, encoding="utf-8"):
        (root / "list.txt").write_bytes(content.encode(encoding))
        return names_and_targets(ImageList("list.txt", "l", "shift").read(reading(root))[0])

    def test_encodings(self, tmp_path, rng):
        write_tree(tmp_path, rng, ["café.png", "b.png"])
        assert self.read(tmp_path, "café.png 1\nb.png\t0\n", "utf-8-sig") == (["café.png", "b.png"], [1, 0])
        refused(lambda: self.read(tmp_path, "b.png 0\ncafé.png 1\n", "latin-1"), "line 2", "list.txt", "UTF-8")

    @pytest.mark.parametrize("label", ["0001", "0.5", "1.0", "None", "nan", "--1", "٣", "9" * 30])
    def test_labels_that_are_no_numbers(self, tmp_path, rng, label):
        write_tree(tmp_path, rng, ["a.png", "b.png"])
        refused(lambda: self.read(tmp_path, f"a.png 0\nb.png {label}\n"), "line 2", "list.txt", label[:20])

    def test_images_that_are_named_twice(self, tmp_path, rng):
        write_tree(tmp_path, rng, ["a.png", "b.png"])
        refused(lambda: self.read(tmp_path, "a.png 0\nb.png 1\na.png 0\n"), "line 3", "'a.png'", "line 1", "twice")
        refused(lambda: self.read(tmp_path, "a.png 0\na.png 1\n"), "line 2", "label is 0, not 1")
        refused(lambda: self.read(tmp_path, "a.png 0\n./a.png 0\n"), "line 2", "'./a.png'", "line 1", "twice")


class TestParquetLabels:
    def read(self, root, rng, labels, **kwargs):
        n = len(labels)
        table = pa.table({"image": [encode(random_pixels(rng, 8, 8))] * n, "label": labels, **kwargs})
        pq.write_table(table, root / "x.parquet")
        (s,) = Parquet("x.parquet", "x", "id", class_name="name" if kwargs else None).read(reading(root))
        return s.images.columns["target"].tolist(), s.class_names

    def test_numbers_as_text_are_in_the_order_of_the_numbers(self, tmp_path, rng):
        assert self.read(tmp_path, rng, ["10", "9", "0", "10"]) == ([2, 1, 0, 2], ("0", "9", "10"))
        named = self.read(tmp_path, rng, ["10", "9", "0"], name=["ten", "nine", "zero"])
        assert named == ([2, 1, 0], ("zero", "nine", "ten"))
        refused(lambda: self.read(tmp_path, rng, ["1", "01"]), "same number", "column label")

    def test_whole_numbers_of_any_type(self, tmp_path, rng):
        for kind in (pa.uint8(), pa.int64(), pa.float32()):
            assert self.read(tmp_path, rng, pa.array([2, 0, 1], kind)) == ([2, 0, 1], None)
        assert self.read(tmp_path, rng, pa.array(["b", "a"]).dictionary_encode()) == ([1, 0], ("a", "b"))

    @pytest.mark.parametrize("labels", [[0, None, 1], ["a", None, "b"], [0.5, None, 1.0]])
    def test_missing_ones(self, tmp_path, rng, labels):
        refused(lambda: self.read(tmp_path, rng, labels), "1 labels", "x.parquet", "row 1")

    def test_others(self, tmp_path, rng):
        refused(lambda: self.read(tmp_path, rng, [0.0, 0.5]), "label 0.5 in row 1", "x.parquet")
        refused(lambda: self.read(tmp_path, rng, [0.0, float("inf")]), "label inf in row 1")
        refused(lambda: self.read(tmp_path, rng, [0.0, float("nan")]), "label nan in row 1")
        refused(lambda: self.read(tmp_path, rng, [True, False]), "bool")
        refused(lambda: self.read(tmp_path, rng, ["a", " "]), "row 1")
        refused(lambda: self.read(tmp_path, rng, [0, 1], name=["a", None]), "class names", "row 1")

    def test_files_that_do_not_go_together(self, tmp_path, rng):
        (tmp_path / "set").mkdir()
        for name, labels in (("a", [0]), ("b", ["cat"])):
            table = pa.table({"image": [encode(random_pixels(rng, 8, 8))], "label": labels})
            pq.write_table(table, tmp_path / "set" / f"{name}.parquet")
        refused(lambda: Parquet("set", "x", "id").read(reading(tmp_path)), "b.parquet", "another type")


class TestCaptions:
    def test_encodings(self, tmp_path, rng):
        write_tree(tmp_path / "p", rng, ["a.png", "b.png"])
        (tmp_path / "p" / "a.txt").write_bytes("café".encode("utf-8-sig"))
        (tmp_path / "p" / "b.txt").write_bytes("café".encode())
        assert FolderPairs("p").read(reading(tmp_path), 2, None).columns["caption"] == ["café", "café"]
        (tmp_path / "p" / "b.txt").write_bytes("café".encode("latin-1"))
        refused(lambda: FolderPairs("p").read(reading(tmp_path), 2, None), "line 1", tmp_path / "p" / "b.txt", "UTF-8")
        write_tar(tmp_path / "w" / "0.tar", [("a.jpg", b"x"), ("a.txt", "café".encode("latin-1"))])
        refused(lambda: ShardPairs("w").read(reading(tmp_path), 1, None), "0.tar:a.txt", "UTF-8")

    def test_tables(self, tmp_path, rng):
        write_tree(tmp_path, rng, ["a.png", "b.png"])
        (tmp_path / "t.csv").write_text("image,caption\na.png,a cat\nb.png,a cat, sitting\n")
        refused(lambda: TablePairs("t.csv").read(reading(tmp_path), 2, None), "line 3", "t.csv", "quotes")
        (tmp_path / "t.csv").write_bytes('image,caption\na.png,None\nb.png,"NA, null"\n'.encode("utf-8-sig"))
        assert TablePairs("t.csv").read(reading(tmp_path), 2, None).columns["caption"] == ["None", "NA, null"]
        (tmp_path / "t.csv").write_text("image,caption\na.png,x\nb.png, \n")
        refused(lambda: TablePairs("t.csv").read(reading(tmp_path), 2, None), "t.csv, line 3", "empty")
        pq.write_table(pa.table({"image": ["a.png", "b.png"], "caption": [["x"], ["y"]]}), tmp_path / "t.parquet")
        refused(lambda: TablePairs("t.parquet").read(reading(tmp_path), 2, None), "row 0", "list")
        pq.write_table(pa.table({"image": ["a.png", None], "caption": ["x", "y"]}), tmp_path / "t.parquet")
        refused(lambda: TablePairs("t.parquet").read(reading(tmp_path), 2, None), "row 1", "no image")


class TestShards:
    def read(self, root, members, n, **kwargs):
        write_tar(root / "web" / "0.tar", members)
        images = ShardPairs("web", **kwargs).read(reading(root), n, None)
        names = [images.source.name(row).rpartition(":")[2] for row in images.rows.tolist()]
        return list(zip(names, images.columns["caption"]))

    def test_dots_in_keys(self, tmp_path):
        members = [("a.b.jpg", b"x"), ("a.b.txt", b"one"), ("a.c.jpg", b"x"), ("a.c.txt", b"two"), ("a.txt", b"lone")]
        assert self.read(tmp_path, members, 2) == [("a.b.jpg", "one"), ("a.c.jpg", "two")]
        assert self.read(tmp_path, [("k.jpg", b"x"), ("k.cap.txt", b"y")], 1, caption="cap.txt") == [("k.jpg", "y")]

    def test_members_apart(self, tmp_path):
        members = [("a.jpg", b"x"), ("b.JPG", b"x"), ("d/a.jpg", b"x"), ("b.txt", b"two"), ("d/a.txt", b"three")]
        pairs = self.read(tmp_path, [*members, ("a.txt", b"one")], 3)
        assert pairs == [("b.JPG", "two"), ("d/a.jpg", "three"), ("a.jpg", "one")]

    def test_what_is_wrong_is_said(self, tmp_path):
        members = [("a.jpg", b"x"), ("a.caption", b"one"), ("a.json", b"{}")]
        refused(lambda: self.read(tmp_path, members, 1), "holds 0", "1 members", "0.tar:a.jpg", "set caption")
        assert self.read(tmp_path, members, 1, caption="caption") == [("a.jpg", "one")]
        refused(lambda: self.read(tmp_path, [("a.gif", b"x"), ("a.json", b"{}")], 1), "2 members", "0.tar:a.gif")
        twice = [("a.jpg", b"x"), ("a.png", b"x"), ("a.txt", b"one")]
        refused(lambda: self.read(tmp_path, twice, 1), "0.tar:a.png", "second image")
