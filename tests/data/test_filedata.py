"""Sets and pairs composed: classes that go together, bad combinations, and a run through the Trainer."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from cases.files import random_pixels, refused, write_image, write_tree
from lightning import Trainer, seed_everything
from open_clip import image_transform
from PIL import Image

from lightning_vlmq.core.identity import digest
from lightning_vlmq.core.preprocessing import Framing
from lightning_vlmq.data import FileData
from lightning_vlmq.data.readers import Folder, FolderPairs, ImageList, ImageNet, ImageNetA, ImageNetV2, Waterbirds
from lightning_vlmq.data.readers.names import IMAGENET, TEMPLATES
from lightning_vlmq.evaluation.classifiers import warn_of_twin_classes, zero_shot_classifiers
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.models import load_vlm
from lightning_vlmq.modules import EvaluationModule, Quantization

CLASSES = ["bag", "coat", "dress"]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng()
    write_tree(tmp_path / "mine", rng, [f"{c}/{k}.png" for c in CLASSES for k in range(4)])
    write_tree(tmp_path / "drawn", rng, [f"{c}/{k}.png" for c in ("dress", "bag") for k in range(3)])
    write_tree(tmp_path / "else", rng, [f"{k}.png" for k in range(5)])
    write_tree(tmp_path / "pairs", rng, [f"{k}.png" for k in range(6)])
    for k in range(6):
        (tmp_path / "pairs" / f"{k}.txt").write_text(f"a photo of a coat number {k}")
    birds = tmp_path / "waterbird_complete95_forest2water2"
    write_tree(birds, rng, [f"{k}.jpg" for k in range(8)])
    lines = [f"{k},{k}.jpg,{k // 4},2,{k % 2},x" for k in range(8)]
    (birds / "metadata.csv").write_text("\n".join(["img_id,img_filename,y,split,place,place_filename", *lines]))
    return tmp_path


MINE = Folder("mine", "mine", "id")
DRAWN = Folder("drawn", "drawn", "shift")
ELSE = Folder("else", "else", "far_ood")


def build(root, *sets, setup=True, **kwargs):
    data = FileData(sets, str(root), **{"image_size": 32, "num_workers": 0, "calibration_pairs": 6, **kwargs})
    if setup:
        data.setup("validate")
    return data


def by_name(data):
    return {s.name: s for s in data.eval_sets}


class TestClasses:
    def test_id_set_names_them_and_a_subset_is_restricted(self, root):
        data = build(root, MINE, DRAWN, ELSE)
        assert data.class_names == tuple(CLASSES) and data.templates == TEMPLATES["photo"]
        drawn = by_name(data)["drawn"]
        assert drawn.classes == (0, 2) and drawn.class_names is None
        assert drawn.images.columns["target"].tolist() == [0, 0, 0, 1, 1, 1]
        assert by_name(data)["mine"].classes is None

    def test_names_and_prompts_given_to_the_module_are_taken(self, root):
        data = build(root, MINE, DRAWN, class_names=["handbag", "overcoat", "gown"], templates="imagenet_simple")
        assert data.class_names == ("handbag", "overcoat", "gown") and len(data.templates) == 7
        assert by_name(data)["drawn"].classes == (0, 2)  # still by the id set's own names

    @pytest.mark.parametrize("classes", [("0", "1", "2"), ("n01440764", "n01443537")])
    def test_classes_called_by_number_are_said(self, tmp_path, caplog, classes):
        rng = np.random.default_rng()
        write_tree(tmp_path / "mine", rng, [f"{name}/a.png" for name in classes])
        build(tmp_path, MINE)
        (said,) = [line for line in caplog.messages if "class_names" in line]
        assert f"called '{classes[0]}' to '{classes[-1]}'" in said
        caplog.clear()
        build(tmp_path, MINE, class_names={name: f"thing {name}" for name in classes})
        assert not [line for line in caplog.messages if "give class_names" in line]

    def test_own_classes_keep_own_names(self, root):
        data = build(root, MINE, Waterbirds(expected=None))
        birds = by_name(data)["waterbirds_common"]
        assert birds.class_names == ("landbird", "waterbird") and birds.templates == TEMPLATES["photo"]

    def test_sets_of_imagenet_share_its_classes(self, tmp_path):
        rng = np.random.default_rng()
        write_tree(tmp_path / "imagenet" / "val", rng, ["n01440764/a.JPEG", "n15075141/b.JPEG"])
        write_tree(tmp_path / "imagenetv2-matched-frequency-format-val", rng, ["3/a.jpeg"])
        write_tree(tmp_path / "imagenet-a", rng, ["n01498041/a.jpg"])
        sets = [ImageNet(expected=None), ImageNetV2(expected=None), ImageNetA(expected=None)]
        data = build(tmp_path, *sets)
        assert data.class_names == IMAGENET and len(data.templates) == 80
        assert all(s.class_names is None and s.templates is None for s in data.eval_sets)
        assert [s.classes for s in data.eval_sets] == [None, None, (6,)]

    def test_classifiers_are_the_model_s_on_these_names(self, root):
        data = build(root, MINE, DRAWN, ELSE, Waterbirds(expected=None))
        vlm = load_vlm("vit_clean")
        with torch.no_grad():
            made = zero_shot_classifiers(vlm, data, FeatureCache(None), "none")
            mine = vlm.class_features(CLASSES, TEMPLATES["photo"])
            birds = vlm.class_features(["landbird", "waterbird"], TEMPLATES["photo"])
        assert made.keys() == by_name(data).keys()
        assert torch.equal(made["mine"], mine) and torch.equal(made["else"], mine)
        assert torch.equal(made["drawn"], mine[[0, 2]])
        assert torch.equal(made["waterbirds_counter"], birds)

    def test_names_that_the_tokenizer_does_not_tell_apart_are_told(self, root, caplog):
        vlm = load_vlm("vit_clean")
        data = build(root, MINE)
        warn_of_twin_classes(vlm, data)
        assert not caplog.records
        data.class_names = ["coat", "xylophone", "aardvark"]  # of which an embedded model knows one
        warn_of_twin_classes(vlm, data)
        (record,) = caplog.records
        assert record.getMessage() == (
            "2 of 3 classes cannot be told apart: their names are the same to the tokenizer of 'vit_clean' (xylophone, aardvark)"
        )


class TestBadInput:
    def test_nothing_to_read(self, root):
        refused(lambda: build(root), "data.sets is empty")
        refused(lambda: build(root, MINE, image_size=0), "image_size")
        refused(lambda: build(root, MINE, calibration_pairs=0), "calibration_pairs")
        refused(lambda: build(root, MINE, batch_size=0), "batch_size")
        refused(lambda: build(root / "none", MINE), root / "none" / "mine", "data.root")

    @pytest.mark.parametrize(
        ("setting", "bad"), [("num_workers", -1), ("decoded_gb", -0.5), ("decoded_gb", float("nan"))]
    )
    def test_numbers_below_nothing(self, root, setting, bad):
        refused(lambda: build(root, MINE, **{setting: bad}), f"{setting} must be at least 0, got {bad}")
        assert len(by_name(build(root, MINE, **{setting: 0}))["mine"].images) == 12

    def test_class_names_that_are_blank(self, root):
        refused(lambda: build(root, MINE, class_names=["bag", " ", "dress"]), "class name 2 of 3 is blank", "name each")
        by_class = {"bag": "a bag", "coat": "a coat", "dress": ""}
        refused(lambda: build(root, MINE, class_names=by_class), "class name 3 of 3 is blank", "name each")
        assert build(root, MINE, class_names=by_class | {"dress": "0"}).class_names == ("a bag", "a coat", "0")

    def test_no_id_set(self, root):
        data = build(root, ELSE)
        refused(data.val_dataloader, "role id")

    def test_classes_that_do_not_go_together(self, root):
        refused(lambda: build(root, MINE, class_names=["a", "b"]), "class_names are 2", "3 classes")
        (root / "drawn" / "dress").rename(root / "drawn" / "gown")
        refused(lambda: build(root, MINE, DRAWN), "'drawn'", "gown", "templates")
        build(root, MINE, Folder("drawn", "drawn", "shift", templates=["a drawing of a {}"]))
        refused(lambda: build(root, MINE, class_names="imagnet"), "imagnet", "imagenet")
        refused(lambda: build(root, MINE, templates="imagenett"), "imagenett", "imagenet")
        refused(lambda: build(root, MINE, templates=["no braces"]), "no braces")

    def test_labels_out_of_range(self, root):
        (root / "list.txt").write_text("mine/bag/0.png 0\nmine/bag/1.png 3\nmine/bag/2.png -2\n")
        message = refused(lambda: build(root, MINE, ImageList("list.txt", "listed", "shift")), "2 labels", "0..2", "3")
        assert "bag/1.png" in message
        refused(lambda: build(root, ImageList("list.txt", "listed", "id")), "does not name its classes")

    def test_same_name_twice(self, root):
        refused(lambda: build(root, MINE, Folder("else", "mine", "far_ood")), "called mine")

    def test_no_pairs(self, root):
        data = build(root, MINE)
        refused(data.calibration_batches, "no caption pairs", "--config data/cc3m")
        refused(data.train_dataloader, "no caption pairs")

    def test_pairs_that_are_evaluated_too(self, root):
        shutil.copy(root / "else" / "3.png", root / "pairs" / "2.png")
        refused(
            lambda: build(root, MINE, ELSE, pairs=FolderPairs("pairs")),
            "1 of 6 calibration images",
            "'else'",
            root / "else" / "3.png",
            root / "pairs" / "2.png",
        )
        build(root, MINE, pairs=FolderPairs("pairs"))  # without that set there is nothing wrong


class TestPairs:
    def test_are_decoded_once_and_kept(self, root, monkeypatch):
        from lightning_vlmq.data.images.sources import FileTree

        first = build(root, MINE, pairs=FolderPairs("pairs"))
        assert len(first.pairs) == 6 and first.pairs.images.shape == (6, 3, 32, 32)
        (batch,) = first.calibration_batches()
        assert batch["caption"][5] == "a photo of a coat number 5" and batch["index"].tolist() == list(range(6))
        monkeypatch.setattr(FileTree, "encoded", lambda *_: pytest.fail("an image was read"))
        assert build(root, MINE, pairs=FolderPairs("pairs")).pairs is first.pairs

    def test_first_or_drawn(self, root):
        def taken(seed):
            return build(root, MINE, pairs=FolderPairs("pairs"), calibration_pairs=3, pairs_seed=seed).pairs.columns[
                "caption"
            ]

        assert [caption[-1] for caption in taken(None)] == ["0", "1", "2"]
        assert taken(1) == taken(1) and len({tuple(taken(seed)) for seed in range(8)}) > 1

    def test_unreadable_ones_stop_or_are_left_out(self, root, caplog):
        (root / "pairs" / "1.png").write_bytes(b"no image")
        refused(lambda: build(root, MINE, pairs=FolderPairs("pairs")), root / "pairs" / "1.png")
        data = build(root, MINE, pairs=FolderPairs("pairs"), on_bad_image="skip")
        assert len(data.pairs) == 5 and "1 of 6 calibration images" in caplog.text
        (batch,) = data.calibration_batches()
        assert [caption[-1] for caption in batch["caption"]] == list("02345")


def validate(data, module):
    seed_everything(0, verbose=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, **quiet)
    trainer.validate(module, data, verbose=False)
    return module


def kept_images(cache):
    return {path.name for path in cache.iterdir() if "texts" not in path.name}


class TestEvaluation:
    SETS = (MINE, DRAWN, ELSE, Waterbirds(expected=None))

    def module(self, **kwargs):
        return EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=8, act_bits=8), **kwargs)

    def test_records_are_those_of_a_plain_loop_and_do_not_depend_on_processes(self, root, tmp_path):
        data = build(root, *self.SETS, pairs=FolderPairs("pairs"), batch_size=5, setup=False)
        module = validate(data, self.module())
        vlm = load_vlm("vit_clean")
        with torch.no_grad():
            made = zero_shot_classifiers(vlm, data, FeatureCache(None), "none")
            for s in data.eval_sets:
                features = vlm.encode_image(s.images.__getitems__(list(range(len(s.images))))["image"])
                guess = vlm.zero_shot_logits(features, made[s.name]).argmax(1)
                assert torch.equal(module.reference_records[s.name]["prediction"], guess)
                assert torch.equal(module.reference_records[s.name]["target"], s.images.columns["target"])
        rows = pd.DataFrame([vars(r) for r in module.rows])
        assert {"rsg", "vuln_add"} <= set(rows.query("dataset == 'waterbirds'")["metric"])
        assert rows.query("dataset == 'else' and metric == 'auroc'")["value"].notna().all()
        again = validate(
            build(root, *self.SETS, pairs=FolderPairs("pairs"), num_workers=2, setup=False), self.module(evaluators=[])
        )
        for name, columns in module.records.items():
            assert torch.equal(columns["prediction"], again.records[name]["prediction"])

    def test_features_are_kept_until_a_file_changes(self, root, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        first = validate(
            build(root, MINE, ELSE, pairs=FolderPairs("pairs"), setup=False),
            self.module(cache=str(cache), evaluators=[]),
        )
        kept = kept_images(cache)
        assert len(kept) == 4  # two sets, two models
        again = validate(
            build(root, MINE, ELSE, pairs=FolderPairs("pairs"), setup=False),
            self.module(cache=str(cache), evaluators=[]),
        )
        assert kept_images(cache) == kept
        assert torch.equal(first.records["mine"]["nll"], again.records["mine"]["nll"])
        write_image(root / "mine" / "bag" / "0.png", np.random.default_rng())
        validate(
            build(root, MINE, ELSE, pairs=FolderPairs("pairs"), setup=False),
            self.module(cache=str(cache), evaluators=[]),
        )
        assert len(kept_images(cache)) == 6  # the changed set's features of both models

    def test_unreadable_images_stop_or_are_left_out(self, root, caplog, tmp_path):
        for k in range(3):
            (root / "mine" / "coat" / f"{k}.png").write_bytes(b"no image")
        data = build(root, MINE, ELSE, batch_size=1, num_workers=2, setup=False)
        refused(lambda: validate(data, EvaluationModule("vit_clean")), root / "mine" / "coat" / "0.png", "skip")
        data = build(root, MINE, ELSE, batch_size=1, on_bad_image="skip", setup=False)
        module = validate(data, EvaluationModule("vit_clean", cache=str(tmp_path / "cache"), evaluators=[]))
        assert module.records["mine"]["index"].tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11]
        assert "3 of 12 images of 'mine'" in caplog.text
        assert len(kept_images(tmp_path / "cache")) == 1  # features of a set with holes are not kept
        for path in (root / "else").iterdir():
            path.write_bytes(b"no image")
        data = build(root, MINE, ELSE, on_bad_image="skip", setup=False)
        refused(lambda: validate(data, EvaluationModule("vit_clean")), "none of the 5 images", "'else'")


def test_content_and_settings_decide_the_identity(root):
    first = digest(build(root, MINE))
    assert digest(build(root, MINE)) == first
    others = [build(root, MINE, ELSE), build(root, MINE, image_size=40), build(root, MINE, train_batch_size=7)]
    others += [build(root, MINE, class_names=["x", "y", "z"]), build(root, MINE, templates=["{}"])]
    assert len({first, *map(digest, others)}) == 6
    Image.new("RGB", (40, 30)).save(root / "mine" / "coat" / "0.png")
    assert digest(build(root, MINE)) != first  # the same settings on a changed file


def test_images_may_be_larger_or_smaller_than_asked_for(root):
    rng = np.random.default_rng()
    for k, (height, width) in enumerate(((8, 9), (70, 33))):
        Image.fromarray(random_pixels(rng, height, width)).save(root / "else" / f"{k}.png")
    assert by_name(build(root, MINE, ELSE))["else"].images.__getitems__([0, 1, 2])["image"].shape == (3, 3, 32, 32)


class TestFraming:
    @pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
    def test_images_are_decoded_as_the_model_of_the_run_wants_them(self, root, mode):
        module = EvaluationModule("vit_clean", evaluators=[])
        framing = Framing(64, mode, "bilinear", 9)
        module.vlm.preprocessing = replace(module.vlm.preprocessing, framing=framing)
        data = build(root, MINE, setup=False, image_size=None)
        Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        ).predict(module, data)  # fmt: skip
        transform = image_transform(
            64, is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode, interpolation="bilinear", fill_color=9
        )
        images = by_name(data)["mine"].images
        with Image.open(root / "mine" / "bag" / "0.png") as image:
            torch.testing.assert_close(images.decode(0) / 255, transform(image))

    def test_another_size_is_said(self, root, caplog):
        data = build(root, MINE, setup=False, image_size=40)
        data.follow(Framing(32, "squash"))
        assert "40 pixels and resized to the model's 32" in caplog.text
        assert data.reading.preprocess.framing == Framing(40, "squash")
