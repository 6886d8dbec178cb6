"""OpenOOD's image lists."""

import numpy as np
import pytest
from cases.files import names_and_targets, reading, refused, write_tree

from lightning_vlmq.data.readers import OpenOOD

FILES = {
    "imagenet": ("images_largescale", ["imagenet_1k/val/ILSVRC2012_val_00024235.JPEG 0", "imagenet_1k/val/x.JPEG 999"]),
    "ssb_hard": ("images_largescale", ["ssb_hard/n11622368/n11622368_1063.JPEG -1"]),
    "ninco": ("images_largescale", ["ninco/amphiuma_means/amphiuma_means_059_35206920.jpg -1", "ninco/x y/z.jpg -1"]),
    "inaturalist": ("images_largescale", ["inaturalist/images/000309dd.jpg -1"]),
    "textures": ("images_classic", ["texture/banded/banded_0004.jpg -1", "texture/banded/banded_0002.jpg -1"]),
    "openimage_o": ("images_largescale", ["openimage_o/images/b85bd6c20e9c378a.jpg -1"]),
}


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng()
    lists = tmp_path / "openood" / "benchmark_imglist" / "imagenet"
    lists.mkdir(parents=True)
    for name, (folder, lines) in FILES.items():
        (lists / f"test_{name}.txt").write_text("\n".join(lines) + "\n")
        write_tree(tmp_path / "openood" / folder, rng, [line.rpartition(" ")[0] for line in lines])
    write_tree(tmp_path / "openood" / "images_classic", rng, ["texture/banded/banded_0099.jpg"])  # in no list
    return tmp_path


def test_sets_are_the_lists_in_their_order(root):
    sets = {s.name: s for s in OpenOOD(sets=tuple(FILES), expected=None).read(reading(root))}
    assert {name: s.role for name, s in sets.items()} == {
        "imagenet": "id",
        "ssb_hard": "near_ood",
        "ninco": "near_ood",
        "inaturalist": "far_ood",
        "textures": "far_ood",
        "openimage_o": "far_ood",
    }
    assert names_and_targets(sets["textures"]) == (["banded_0004.jpg", "banded_0002.jpg"], [-1, -1])
    assert names_and_targets(sets["ninco"])[0][1] == "z.jpg"
    assert names_and_targets(sets["imagenet"])[1] == [0, 999] and len(sets["imagenet"].class_names) == 1000
    assert all(s.images[0]["image"].shape == (3, 16, 16) for s in sets.values())


def test_published_lengths(root):
    for name, n in (
        ("ssb_hard", 49000),
        ("ninco", 5879),
        ("inaturalist", 10000),
        ("textures", 5160),
        ("openimage_o", 15869),
    ):
        refused(lambda name=name: OpenOOD(sets=(name,)).read(reading(root)), name, str(n))


def test_gone_wrong(root, tmp_path):
    refused(lambda: OpenOOD(sets=("textures", "nincoo")).read(reading(root)), "nincoo")
    how = OpenOOD(sets=("ninco",), expected=None)
    listed = root / "openood/benchmark_imglist/imagenet/test_ninco.txt"
    (root / "openood/images_largescale/ninco/x y/z.jpg").unlink()
    refused(lambda: how.read(reading(root)), "ninco/x y/z.jpg", "names 2 images", "1 of them")
    listed.write_text("ninco/a.jpg\n")
    refused(lambda: how.read(reading(root)), "line 1", "ninco/a.jpg")
    listed.write_text("\n")
    refused(lambda: how.read(reading(root)), listed, "empty")
    listed.unlink()
    refused(lambda: how.read(reading(root)), listed, "does not exist")
