"""ImageNet-1k and the sets for its classes, on trees in their published layouts."""

import json

import numpy as np
import pytest
import torch
from cases.files import names_and_targets, reading, refused, write_image, write_json, write_tree
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo

from lightning_vlmq.data.readers import ImageNet, ImageNetA, ImageNetC, ImageNetR, ImageNetSketch, ImageNetV2, ObjectNet
from lightning_vlmq.data.readers.imagenet import BENCHMARK
from lightning_vlmq.data.readers.names import IMAGENET, TEMPLATES, imagenet_subset

WNIDS = ImageNetInfo("imagenet-1k").label_names()
TENCH, COCK, TOILET_PAPER = "n01440764", "n01514668", "n15075141"  # labels 0, 7, 999


@pytest.fixture
def rng():
    return np.random.default_rng()


def test_class_names_go_with_the_sorted_wnids():
    assert sorted(WNIDS) == WNIDS and len(IMAGENET) == 1000
    for wnid, name in ((TENCH, "tench"), (COCK, "rooster"), (TOILET_PAPER, "toilet paper")):
        assert IMAGENET[WNIDS.index(wnid)] == name
    assert len(TEMPLATES["imagenet"]) == 80 and len(TEMPLATES["imagenet_simple"]) == 7
    assert all(t.count("{}") == 1 and t.endswith((".", "{}")) for prompts in TEMPLATES.values() for t in prompts)


def test_cifar_prompts_are_the_published_18():
    published = TEMPLATES["cifar"]
    assert len(set(published)) == 18
    assert published[:3] == ("a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.")
    assert published[7:10] == ("a photo of a small {}.", "a photo of a big {}.", "a photo of the {}.")
    assert published[-2:] == ("a photo of the small {}.", "a photo of the big {}.")


class TestImageNet:
    FILES = (
        f"{TOILET_PAPER}/ILSVRC2012_val_00000002.JPEG",
        f"{TENCH}/ILSVRC2012_val_00000293.JPEG",
        f"{COCK}/ILSVRC2012_val_00000329.JPEG",
        f"{TENCH}/ILSVRC2012_val_00002138.JPEG",
    )

    def test_class_folders(self, tmp_path, rng):
        write_tree(tmp_path / "imagenet" / "val", rng, self.FILES)
        (tmp_path / "imagenet" / "val" / TENCH / ".DS_Store").write_bytes(b"")
        (tmp_path / "imagenet" / "val" / TENCH / "notes.txt").write_text("no image")
        (s,) = ImageNet(expected=None).read(reading(tmp_path))
        assert (s.name, s.role, len(s.class_names)) == ("imagenet", "id", 1000)
        names, targets = names_and_targets(s)
        assert [n[-8:-5] for n in names] == ["293", "138", "329", "002"] and targets == [0, 0, 7, 999]
        assert s.images.__getitems__([2])["image"].shape == (1, 3, 16, 16)

    def write_flat(self, tmp_path, rng):
        names = [f"ILSVRC2012_val_{k:08}.JPEG" for k in (1, 2, 3)]
        write_tree(tmp_path / "img", rng, names)
        return names, [999, 0, 7]

    def test_flat_layout_by_wnids(self, tmp_path, rng):
        _, labels = self.write_flat(tmp_path, rng)
        (tmp_path / "synset_labels.txt").write_text("".join(f"{WNIDS[label]}\n" for label in labels))
        (s,) = ImageNet(path="img", labels="synset_labels.txt", expected=None).read(reading(tmp_path))
        assert names_and_targets(s)[1] == labels

    def test_flat_layout_by_names_in_any_order(self, tmp_path, rng):
        names, labels = self.write_flat(tmp_path, rng)
        lines = [f"{name} {label}\n" for name, label in zip(names, labels)]
        (tmp_path / "val.txt").write_text("".join(reversed(lines)))
        (s,) = ImageNet(path="img", labels="val.txt", expected=None).read(reading(tmp_path))
        assert names_and_targets(s)[1] == labels

    def test_flat_layout_by_the_development_kits_numbers(self, tmp_path, rng):
        _, labels = self.write_flat(tmp_path, rng)
        number = dict(zip(WNIDS, rng.permutation(1000) + 1))  # the kit has an order of its own
        kind = [("ILSVRC2012_ID", object), ("WNID", object)]
        synsets = np.array([(number[w], w) for w in WNIDS] + [(1001, "n00000001")], dtype=kind)
        savemat(tmp_path / "meta.mat", {"synsets": synsets[:, None]})
        truth = "".join(f"{number[WNIDS[label]]}\n" for label in labels)
        (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
        how = ImageNet(path="img", labels="ILSVRC2012_validation_ground_truth.txt", expected=None)
        (s,) = how.read(reading(tmp_path))
        assert names_and_targets(s)[1] == labels
        (tmp_path / "meta.mat").unlink()
        refused(lambda: how.read(reading(tmp_path)), "meta.mat")

    def test_half_there(self, tmp_path, rng):
        refused(lambda: ImageNet().read(reading(tmp_path)), tmp_path / "imagenet" / "val", "data.root")
        folder = tmp_path / "imagenet" / "val"
        write_tree(folder, rng, self.FILES)
        refused(lambda: ImageNet().read(reading(tmp_path)), "997 of 1000 class folders", "n01443537", "expected: null")
        for wnid in WNIDS:
            (folder / wnid).mkdir(exist_ok=True)
        refused(lambda: ImageNet().read(reading(tmp_path)), "has 4 images", "50000")
        assert len(ImageNet(expected=4).read(reading(tmp_path))[0].images) == 4
        (folder / "n99999999").mkdir()
        refused(lambda: ImageNet(expected=None).read(reading(tmp_path)), "n99999999", "none of the 1000 classes")

    def test_flat_layout_gone_wrong(self, tmp_path, rng):
        names, _ = self.write_flat(tmp_path, rng)
        refused(lambda: ImageNet(path="img").read(reading(tmp_path)), "no class folders", "labels")
        how = ImageNet(path="img", labels="val.txt")
        refused(lambda: how.read(reading(tmp_path)), "val.txt", "does not exist")
        (tmp_path / "val.txt").write_text(f"{names[0]} 0\n")
        refused(lambda: how.read(reading(tmp_path)), "1 labels", "3 images")
        (tmp_path / "val.txt").write_text("".join(f"{name} {label}\n" for name, label in zip(names, (0, 1000, 2))))
        refused(lambda: how.read(reading(tmp_path)), "label 2", "1000")

    def test_a_list_whose_images_are_not_the_folders(self, tmp_path, rng):
        names, labels = self.write_flat(tmp_path, rng)
        how = ImageNet(path="img", labels="val.txt", expected=None)

        def listed(*entries):
            (tmp_path / "val.txt").write_text("".join(f"{name} {label}\n" for name, label in entries))
            return how.read(reading(tmp_path))

        twice = [(names[0], 1), (f"val/{names[0]}", 2), (names[2], 3)]
        refused(lambda: listed(*twice), tmp_path / "val.txt", f"names an image '{names[0]}' more than once", "keep one")
        stranger = [*zip(names[:2], labels), ("ILSVRC2012_val_00000009.JPEG", 3)]
        refused(
            lambda: listed(*stranger), tmp_path / "val.txt", f"no label for the image '{names[2]}'", "complete the list"
        )
        (s,) = listed(*((f"val/{name}", label) for name, label in zip(names, labels)))
        assert names_and_targets(s) == (names, labels)
        (tmp_path / "img" / names[2]).unlink()
        write_image(tmp_path / "img" / "more" / names[0], rng)
        refused(
            lambda: listed(*zip(names, labels)),
            tmp_path / "img",
            f"has an image '{names[0]}' more than once",
            "keep one",
        )

    @pytest.mark.parametrize("damage", ["cut", "text", "empty", "another's", "other fields"])
    def test_a_table_of_the_development_kit_that_is_none(self, tmp_path, rng, damage):
        self.write_flat(tmp_path, rng)
        (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n")
        how = ImageNet(path="img", labels="ILSVRC2012_validation_ground_truth.txt", expected=None)
        meta = tmp_path / "meta.mat"
        kind = [("ILSVRC2012_ID", object), ("WNID", object)]
        synsets = np.array([(k + 1, wnid) for k, wnid in enumerate(WNIDS)], dtype=kind)
        savemat(meta, {"synsets": synsets})
        assert names_and_targets(how.read(reading(tmp_path))[0])[1] == [0, 1, 2]
        content = meta.read_bytes()
        if damage == "another's":
            savemat(meta, {"x": np.arange(3)})
        elif damage == "other fields":
            savemat(meta, {"synsets": np.array([(1, "x")], dtype=[("number", object), ("name", object)])})
        else:
            meta.write_bytes({"cut": content[: len(content) // 2], "text": b"no table", "empty": b""}[damage])
        refused(lambda: how.read(reading(tmp_path)), meta, "damaged or not the development kit's", "fetch it again")

    def test_image_outside_the_class_folders(self, tmp_path, rng):
        write_tree(tmp_path, rng, [f"{TENCH}/a.JPEG", "b.JPEG"])
        refused(lambda: ImageNet(path=".", expected=None).read(reading(tmp_path)), "b.JPEG", "outside")


def test_v2_folders_are_the_labels(tmp_path, rng):
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    write_tree(folder, rng, ["0/a.jpeg", "10/b.jpeg", "2/c.jpeg", "999/d.jpeg"])
    (s,) = ImageNetV2(expected=None).read(reading(tmp_path))
    assert s.role == "shift" and names_and_targets(s) == (
        ["a.jpeg", "b.jpeg", "c.jpeg", "d.jpeg"],
        [0, 10, 2, 999],
    )
    refused(lambda: ImageNetV2().read(reading(tmp_path)), "996 of 1000")
    (folder / "1000").mkdir()
    refused(lambda: ImageNetV2(expected=None).read(reading(tmp_path)), "1000")


@pytest.mark.parametrize(("reader", "letter"), [(ImageNetA, "a"), (ImageNetR, "r")])
def test_a_and_r_are_restricted_to_the_classes_present(tmp_path, rng, reader, letter):
    wnids = imagenet_subset(letter)
    assert len(wnids) == 200
    chosen = [wnids[k] for k in (150, 3, 77)]
    write_tree(tmp_path / f"imagenet-{letter}", rng, [f"{wnid}/{k}.jpg" for wnid in chosen for k in range(2)])
    (s,) = reader(expected=None).read(reading(tmp_path))
    assert s.classes == tuple(sorted(WNIDS.index(w) for w in chosen)) and s.role == "shift"
    target = s.images.columns["target"]
    folders = [s.images.source.path(row).split("/")[0] for row in s.images.rows.tolist()]
    assert [WNIDS[s.classes[t]] for t in target.tolist()] == folders
    refused(lambda: reader().read(reading(tmp_path)), "197 of 200", wnids[0])
    other = next(w for w in WNIDS if w not in wnids)
    (tmp_path / f"imagenet-{letter}" / other).mkdir()
    refused(lambda: reader(expected=None).read(reading(tmp_path)), other, "none of the 200 classes")


def test_sketch(tmp_path, rng):
    write_tree(tmp_path / "imagenet-sketch", rng, [f"{COCK}/sketch_0.JPEG", f"{TENCH}/sketch_1.JPEG"])
    (s,) = ImageNetSketch(expected=None).read(reading(tmp_path))
    assert (s.role, s.classes) == ("shift", None) and names_and_targets(s)[1] == [0, 7]


class TestImageNetC:
    def write(self, root, rng, corruptions=("fog", "gaussian_noise"), severities=(1, 5)):
        files = [f"{c}/{s}/{w}/ILSVRC2012_val_1.JPEG" for c in corruptions for s in severities for w in (TENCH, COCK)]
        write_tree(root / "imagenet-c", rng, files)

    def test_a_set_a_corruption_and_severity(self, tmp_path, rng):
        self.write(tmp_path, rng)
        how = ImageNetC(corruptions=("gaussian_noise", "fog"), severities=(5, 1), expected=None)
        sets = how.read(reading(tmp_path))
        assert [(s.name, s.corruption, s.severity) for s in sets] == [
            ("imagenet_c_gaussian_noise_5", "gaussian_noise", 5),
            ("imagenet_c_gaussian_noise_1", "gaussian_noise", 1),
            ("imagenet_c_fog_5", "fog", 5),
            ("imagenet_c_fog_1", "fog", 1),
        ]
        assert len({s.digest for s in sets}) == 4 and {s.role for s in sets} == {"corruption"}
        for s in sets:
            assert names_and_targets(s)[1] == [0, 7]
            assert s.images.source.name(0).endswith(
                f"imagenet-c/{s.corruption}/{s.severity}/{TENCH}/ILSVRC2012_val_1.JPEG"
            )

    def test_gone_wrong(self, tmp_path, rng):
        assert len(BENCHMARK) == 15 and "speckle_noise" not in BENCHMARK
        self.write(tmp_path, rng)
        refused(
            lambda: ImageNetC(expected=None).read(reading(tmp_path)),
            "shot_noise",
            "imagenet-c",
            "impulse_noise, defocus_blur, …",
        )
        refused(lambda: ImageNetC(corruptions=("fogg",)).read(reading(tmp_path)), "fogg", "fog")
        refused(lambda: ImageNetC(corruptions=("fog",), severities=(0,)).read(reading(tmp_path)), "1..5")
        refused(
            lambda: ImageNetC(corruptions=("fog",), expected=None).read(reading(tmp_path)), "fog/2", "does not exist"
        )
        refused(
            lambda: ImageNetC(corruptions=("fog",), severities=(1,)).read(reading(tmp_path)), "998 of 1000", "fog/1"
        )


FOLDERS_OF_OBJECTNET = {"alarm_clock": "Alarm clock", "banana": "Banana", "bed_sheet": "Bed sheet", "tie": "Tie"}


class TestObjectNet:
    def write(self, root, rng):
        write_json(root / "objectnet-1.0/mappings/folder_to_objectnet_label.json", FOLDERS_OF_OBJECTNET)
        shared = {
            "Alarm clock": "analog clock; digital clock",
            "Banana": "banana",
            "Tie": "bow tie, bow-tie, bowtie; Windsor tie",
        }
        write_json(root / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json", shared)
        for folder in FOLDERS_OF_OBJECTNET:
            write_image(root / "objectnet-1.0/images" / folder / f"{folder}.png", rng)

    def test_shared_classes_under_their_own_names_without_the_frame(self, tmp_path, rng):
        self.write(tmp_path, rng)
        framed = np.full((20, 20, 3), (255, 0, 0), np.uint8)
        framed[2:-2, 2:-2] = (0, 0, 255)
        Image.fromarray(framed).save(tmp_path / "objectnet-1.0/images/banana/banana.png")
        (s,) = ObjectNet(expected=None).read(reading(tmp_path))
        assert s.class_names == ("alarm clock", "banana", "tie") and s.templates == TEMPLATES["photo"]
        assert names_and_targets(s) == (["alarm_clock.png", "banana.png", "tie.png"], [0, 1, 2])
        blue = s.images[1]["image"]
        assert torch.equal(blue, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 16, 16))

    def test_gone_wrong(self, tmp_path, rng):
        refused(lambda: ObjectNet().read(reading(tmp_path)), "objectnet-1.0/images")
        self.write(tmp_path, rng)
        refused(lambda: ObjectNet().read(reading(tmp_path)), "has 3 images", "18574")
        (tmp_path / "objectnet-1.0/images/tie/tie.png").unlink()
        (tmp_path / "objectnet-1.0/images/tie").rmdir()
        refused(lambda: ObjectNet().read(reading(tmp_path)), "1 of 3 class folders", "tie")
        mapping = tmp_path / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json"
        mapping.write_text(json.dumps({"Banana": "banana"})[:-3])
        refused(lambda: ObjectNet().read(reading(tmp_path)), mapping, "damaged")
        for values in ({"Banana": 954}, {"Banana": None}, {"Banana": ["banana"]}):
            write_json(mapping, values)
            refused(lambda: ObjectNet(expected=None).read(reading(tmp_path)), mapping, "damaged; fetch it again")
        write_json(mapping, {"Banana": "banana"})
        assert ObjectNet(expected=None).read(reading(tmp_path))[0].class_names == ("banana",)
        mapping.unlink()
        refused(lambda: ObjectNet().read(reading(tmp_path)), mapping, "does not exist")
