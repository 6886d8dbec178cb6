"""CIFAR-10, CIFAR-100 and their corrupted versions, in torchvision's and in the published layout."""

import numpy as np
import pytest
import torch
import torchvision.datasets
from cases.files import reading, refused, write_cifar

from lightning_vlmq.data.readers import CIFAR, CIFARC
from lightning_vlmq.data.readers.names import CIFAR10, TEMPLATES

FINE = ["apple", "aquarium_fish", "maple_tree"]


@pytest.fixture
def rng():
    return np.random.default_rng()


def trust(monkeypatch, kind, md5):
    """Let torchvision, which knows the published files' hashes, take the ones just written."""
    (name, _), *_ = kind.test_list
    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [[name, md5[name]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5[kind.meta["filename"]]})


@pytest.mark.parametrize("classes", [10, 100])
def test_torchvisions_files(tmp_path, rng, monkeypatch, classes):
    kind = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    pixels, labels, md5 = write_cifar(tmp_path / "cifar", rng, 12, None if classes == 10 else FINE)
    trust(monkeypatch, kind, md5)
    (s,) = CIFAR(classes=classes, expected=12).read(reading(tmp_path, size=32))
    assert (s.name, s.role) == (f"cifar{classes}", "id") and s.templates == TEMPLATES["cifar"]
    assert s.class_names == (CIFAR10 if classes == 10 else ("apple", "aquarium fish", "maple tree"))
    batch = s.images.__getitems__(list(range(12)))
    assert (
        torch.equal(batch["image"], torch.from_numpy(pixels).permute(0, 3, 1, 2)) and batch["target"].tolist() == labels
    )
    for size, side in ((16, 16), (224, 32)):  # made smaller if asked for, never larger
        image = CIFAR(classes=classes, expected=None).read(reading(tmp_path, size))[0].images[0]["image"]
        assert image.shape == (3, side, side)
    refused(lambda: CIFAR(classes=classes).read(reading(tmp_path)), "has 12 images", "10000")


def test_damaged_or_missing_cifar(tmp_path, rng):
    refused(lambda: CIFAR().read(reading(tmp_path)), tmp_path / "cifar")
    write_cifar(tmp_path / "cifar", rng, 12)  # not the published files: torchvision refuses their hashes
    refused(lambda: CIFAR().read(reading(tmp_path)), "cifar-10-batches-py", "cifar-10-python.tar.gz")


class TestCorrupted:
    def write(self, folder, rng, corruptions=("fog", "contrast"), n=4):
        folder.mkdir()
        arrays = {c: rng.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8) for c in corruptions}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        labels = np.tile(rng.integers(0, 10, n), 5)
        np.save(folder / "labels.npy", labels)
        return arrays, labels

    @pytest.mark.parametrize("classes", [10, 100])
    def test_fifths_are_the_severities(self, tmp_path, rng, classes):
        arrays, labels = self.write(tmp_path / f"CIFAR-{classes}-C", rng)
        how = CIFARC(classes=classes, corruptions=("contrast", "fog"), severities=(1, 3, 5), expected=4)
        sets = how.read(reading(tmp_path, size=32))
        assert [(s.corruption, s.severity) for s in sets] == [(c, s) for c in ("contrast", "fog") for s in (1, 3, 5)]
        assert len({s.digest for s in sets}) == 6
        for s in sets:
            assert s.name == f"cifar{classes}_c_{s.corruption}_{s.severity}" and s.role == "corruption"
            assert s.class_names == (CIFAR10 if classes == 10 else None)
            batch = s.images.__getitems__([0, 1, 2, 3])
            part = slice(4 * (s.severity - 1), 4 * s.severity)
            assert torch.equal(batch["image"], torch.from_numpy(arrays[s.corruption][part]).permute(0, 3, 1, 2))
            assert batch["target"].tolist() == labels[part].tolist()

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda labels: labels.astype(np.float32), "float32 [20]"),
            (lambda labels: labels[:, None], "int64 [20, 1]"),
            (lambda labels: np.eye(10, dtype=np.int64)[labels], "int64 [20, 10]"),
            (lambda labels: labels.astype(str), "<U21 [20]"),
            (lambda labels: labels > 4, "bool [20]"),
            (lambda labels: np.array(7), "int64 []"),
        ],
    )
    def test_labels_that_are_not_one_whole_number_an_image(self, tmp_path, rng, make, said):
        folder = tmp_path / "CIFAR-10-C"
        _, labels = self.write(folder, rng)
        np.save(folder / "labels.npy", make(labels))
        how = CIFARC(corruptions=("fog",), expected=None)
        refused(lambda: how.read(reading(tmp_path)), folder / "labels.npy", said, "one whole number", "fetch it again")

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, ">i8"])
    def test_whole_numbers_of_any_width_are_labels(self, tmp_path, rng, dtype):
        _, labels = self.write(tmp_path / "CIFAR-10-C", rng)
        np.save(tmp_path / "CIFAR-10-C" / "labels.npy", labels.astype(dtype))
        (s,) = CIFARC(corruptions=("fog",), severities=(2,), expected=4).read(reading(tmp_path))
        assert s.images.columns["target"].tolist() == labels[4:8].tolist()

    @pytest.mark.parametrize("name", ["labels", "fog"])
    def test_an_archive_of_arrays_is_no_array(self, tmp_path, rng, name):
        folder = tmp_path / "CIFAR-10-C"
        arrays, labels = self.write(folder, rng)
        with (folder / f"{name}.npy").open("wb") as file:  # numpy goes by the content, not by the suffix
            np.savez(file, labels if name == "labels" else arrays["fog"])
        how = CIFARC(corruptions=("fog",), expected=None)
        refused(lambda: how.read(reading(tmp_path)), folder / f"{name}.npy", "no numpy array", "fetch it again")

    def test_gone_wrong(self, tmp_path, rng):
        folder = tmp_path / "CIFAR-10-C"
        how = CIFARC(corruptions=("fog",), expected=None)
        refused(lambda: how.read(reading(tmp_path)), folder)
        self.write(folder, rng)
        refused(lambda: CIFARC(corruptions=("snow",)).read(reading(tmp_path)), "snow.npy", "does not exist")
        refused(lambda: CIFARC(corruptions=("fog",)).read(reading(tmp_path)), "has 4 images", "10000")
        np.save(folder / "fog.npy", np.zeros((19, 32, 32, 3), np.uint8))
        refused(lambda: how.read(reading(tmp_path)), "fog.npy", "[19, 32, 32, 3]", "20 labels")
        (folder / "fog.npy").write_bytes((folder / "contrast.npy").read_bytes()[:500])
        refused(lambda: how.read(reading(tmp_path)), "fog.npy", "damaged")
        (folder / "labels.npy").unlink()
        refused(lambda: how.read(reading(tmp_path)), "labels.npy")
