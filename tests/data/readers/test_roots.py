"""Every reader finds its files from a relative root as from an absolute one, and from its own path alone."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from cases.files import encode, random_pixels, reading, write_cifar, write_json, write_tar, write_tree

from lightning_vlmq.data import readers
from lightning_vlmq.data.readers import PairReader, Reader


def layouts(root, rng):
    """Write a tiny copy of every layout; returns the readers of it."""
    write_tree(
        root,
        rng,
        [
            *(f"imagenet/val/{wnid}/a.JPEG" for wnid in ("n01440764", "n15075141")),
            "imagenetv2-matched-frequency-format-val/3/a.jpeg",
            "imagenet-a/n01498041/a.jpg",
            "imagenet-r/n01443537/a.jpg",
            "imagenet-sketch/n01440764/a.JPEG",
            "imagenet-c/fog/3/n01440764/a.JPEG",
            "objectnet-1.0/images/tie/a.png",
            "LAION-final/10 salamander/common-grass/a.jpg",
            "LAION-final/10 salamander/counter-snow/b.jpg",
            "waterbird_complete95_forest2water2/0.jpg",
            "waterbird_complete95_forest2water2/1.jpg",
            "celeba/img_align_celeba/0.jpg",
            "celeba/img_align_celeba/1.jpg",
            "openood/images_largescale/ninco/a.jpg",
            "mine/cat/a.png",
            "mine/dog/b.png",
            "pairs/a.png",
        ],
    )
    write_json(root / "objectnet-1.0/mappings/folder_to_objectnet_label.json", {"tie": "Tie"})
    write_json(root / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json", {"Tie": "bow tie"})
    birds = "img_id,img_filename,y,split,place,place_filename\n0,0.jpg,0,2,0,x\n1,1.jpg,0,2,1,x\n"
    (root / "waterbird_complete95_forest2water2/metadata.csv").write_text(birds)
    (root / "celeba/list_attr_celeba.txt").write_text("2\nBlond_Hair Male\n0.jpg 1 -1\n1.jpg 1 1\n")
    (root / "celeba/list_eval_partition.txt").write_text("0.jpg 2\n1.jpg 2\n")
    (root / "openood/benchmark_imglist/imagenet").mkdir(parents=True)
    (root / "openood/benchmark_imglist/imagenet/test_ninco.txt").write_text("ninco/a.jpg -1\n")
    (root / "CIFAR-10-C").mkdir()
    np.save(root / "CIFAR-10-C" / "fog.npy", rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    np.save(root / "CIFAR-10-C" / "labels.npy", np.zeros(5, np.int64))
    (root / "list.txt").write_text("mine/cat/a.png 0\n")
    pq.write_table(pa.table({"image": [encode(random_pixels(rng))], "label": [0]}), root / "x.parquet")
    (root / "pairs/a.txt").write_text("a caption")
    (root / "t.csv").write_text("image,caption\npairs/a.png,a caption\n")
    write_tar(root / "web/0.tar", [("a.png", encode(random_pixels(rng))), ("a.txt", b"a caption")])
    whole = {"expected": None}
    named = [
        ("ImageNet", whole),
        ("ImageNetV2", whole),
        ("ImageNetA", whole),
        ("ImageNetR", whole),
        ("ImageNetSketch", whole),
        ("ImageNetC", {"corruptions": ("fog",), "severities": (3,), **whole}),
        ("ObjectNet", whole),
        ("CounterAnimal", whole),
        ("Waterbirds", whole),
        ("CelebA", whole),
        ("OpenOOD", {"sets": ("ninco",), **whole}),
        ("CIFAR", whole),
        ("CIFARC", {"corruptions": ("fog",), "severities": (2,), **whole}),
        ("Folder", {"path": "mine", "name": "mine", "role": "id"}),
        ("ImageList", {"path": "list.txt", "name": "l", "role": "shift"}),
        ("Parquet", {"path": "x.parquet", "name": "x", "role": "shift"}),
        ("FolderPairs", {"path": "pairs"}),
        ("TablePairs", {"path": "t.csv"}),
        ("ShardPairs", {"path": "web"}),
    ]
    return {name: getattr(readers, name)(**settings) for name, settings in named}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def every(root):
    with pytest.MonkeyPatch.context() as patch:
        rng = np.random.default_rng()
        _, _, md5 = write_cifar(root / "cifar", rng, 3)
        kind = torchvision.datasets.CIFAR10
        patch.setattr(kind, "train_list", [])
        patch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
        patch.setattr(kind, "meta", {**kind.meta, "md5": md5[kind.meta["filename"]]})
        yield layouts(root, rng)


def names():
    known = [n for n in readers.__all__ if issubclass(getattr(readers, n), Reader | PairReader)]
    return sorted(set(known) - {"Reader", "PairReader"})


def first_pixels(reader, how):
    pairs = isinstance(reader, PairReader)
    images = [reader.read(how, 1, None)] if pairs else [s.images for s in reader.read(how)]
    return [i.digest() for i in images], torch.stack([i.decode(0) for i in images])


@pytest.mark.parametrize("name", names())
def test_relative_and_absolute_roots_are_the_same(root, every, name, monkeypatch):
    digests, pixels = first_pixels(every[name], reading(root))
    monkeypatch.chdir(root.parent)
    for given in (Path(root.name), Path(".") / root.name / "mine" / "..", Path(os.path.relpath(root))):
        again, same = first_pixels(every[name], reading(given))
        assert again == digests and torch.equal(same, pixels)


@pytest.mark.parametrize("name", names())
def test_files_are_found_after_the_working_folder_changed(root, every, name, monkeypatch, tmp_path):
    monkeypatch.chdir(root.parent)
    how = reading(Path(root.name))
    monkeypatch.chdir(tmp_path)  # as the loader's processes, or a Hydra job, may do
    assert len(first_pixels(every[name], how)[1])


def test_home_is_known(root, every, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert first_pixels(every["Folder"], reading(Path("~") / root.name))


def test_every_layout_is_here(every):
    assert sorted(every) == names()
