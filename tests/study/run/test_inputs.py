"""What runs read and record, found out without running one."""

from __future__ import annotations

import dataclasses
import os
import shutil

import numpy as np
import open_clip
import pytest
from cases.files import write_image, write_tree

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images import Preprocess
from lightning_vlmq.study.run.costs import UnitCosts, _built, measure
from lightning_vlmq.study.run.grid import Run
from lightning_vlmq.study.run.inputs import data_digest, data_of, model_setting, n_surgeries, setting
from lightning_vlmq.study.run.plan import Plan, plan

CONFIG = """
data:
  class_path: lightning_vlmq.data.FileData
  init_args:
    image_size: 32
    num_workers: 0
    sets:
      - class_path: lightning_vlmq.data.readers.Folder
        init_args: {name: mine, path: mine, role: id}
      - class_path: lightning_vlmq.data.readers.Folder
        init_args: {name: else, path: else, role: far_ood}
model:
  class_path: lightning_vlmq.modules.EvaluationModule
  init_args: {scores: [msp, energy, knn], lst: true}
trainer: {max_epochs: 5}
"""


@pytest.fixture
def arguments(tmp_path):
    """Of a run on two folders of images below ``data``."""
    rng = np.random.default_rng(0)
    write_tree(tmp_path / "data" / "mine", rng, [f"{c}/{k}.png" for c in ("bag", "coat") for k in range(4)])
    write_tree(tmp_path / "data" / "else", rng, [f"a/{k}.png" for k in range(5)])
    (tmp_path / "data.yaml").write_text(CONFIG)
    return ["validate", "--config", str(tmp_path / "data.yaml"), f"--data.root={tmp_path / 'data'}"]


def test_data_are_what_lies_there_not_where_it_lies(arguments, tmp_path):
    first = data_digest(arguments)
    shutil.copytree(tmp_path / "data", tmp_path / "moved")  # copies times of change too
    moved = [*arguments[:-1], f"--data.root={tmp_path / 'moved'}"]
    assert data_digest(moved) == first == data_digest(arguments)
    write_image(tmp_path / "moved" / "mine" / "bag" / "9.png", np.random.default_rng(1))
    more = data_digest(moved)
    assert more != first
    image = tmp_path / "data" / "mine" / "bag" / "0.png"
    status = image.stat()
    write_image(image, np.random.default_rng(2))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert data_digest(arguments) not in (first, more)
    with pytest.raises(VLMQError, match="nowhere"):
        data_digest([*arguments[:-1], "--data.root=/nowhere"])


def test_names_and_prompts_are_part_of_the_data_whatever_file_holds_them(arguments, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a bag\na coat\n")
    named = [*arguments, f"--data.class_names={names}"]
    first = data_digest(named)
    assert first != data_digest(arguments)
    names.write_text("a satchel\na coat\n")
    assert data_digest(named) != first
    assert data_digest([*arguments, "--data.templates=imagenet_simple"]) != data_digest(arguments)
    assert data_digest(["validate", "--config", "configs/eval.yaml", "--data.n_id=48"]) == ""  # in no files


def test_an_option_and_its_value_may_be_two_words(arguments, tmp_path):
    apart = [
        *arguments[:1],
        f"--config={arguments[2]}",
        "--data.root",
        str(tmp_path / "data"),
        "--data.max_images",
        "3",
    ]
    data = data_of(apart)
    assert (data.reading.max_images, data.reading.root) == (3, tmp_path / "data")
    assert setting(apart, "data", "max_images", None) == 3 and setting(apart, "trainer", "max_epochs", 1) == 5
    assert setting([*apart, "--config={data: {max_images: 4}}"], "data", "max_images", None) == 4
    together = [*arguments, "--data.max_images=3"]
    assert data_digest(apart) == data_digest(together)


def test_what_the_data_do_not_take_is_said_with_its_reason(arguments):
    with pytest.raises(VLMQError, match=r"the study's data cannot be set up: .*n_id") as caught:
        data_of([*arguments, "--data.n_id=964"])
    assert "\n" not in str(caught.value)
    with pytest.raises(VLMQError, match=r"the study's data cannot be set up: max_images must be at least 1"):
        data_of([*arguments, "--data.max_images=0"])


def test_settings_come_from_the_command_line_then_configs_then_defaults(arguments):
    assert model_setting(arguments, "scores") == ["msp", "energy", "knn"] and model_setting(arguments, "lst") is True
    assert model_setting([*arguments, "--model.scores=[mcm]"], "scores") == ["mcm"]
    assert model_setting(["validate"], "lst") is False
    assert setting(arguments, "trainer", "max_epochs", 1) == 5 and setting(["fit"], "trainer", "max_epochs", 1) == 1


def test_surgeries_count_where_they_are_made(arguments):
    """By hand: three bands healed, three hurt, two parts of the error; of minmax alone."""
    several = ["{class_path: ErrorSurgery, init_args: {bands: [[0, 4], [4, null]]}}"]
    several += ["{class_path: x.ErrorSurgery, init_args: {bands: [[0, null]]}}"]
    words = (
        "[lightning_vlmq.callbacks.CoveragePrinter,lightning_vlmq.callbacks.ErrorSurgery]",
        f"[{', '.join(several)}]",
        "[x.Other]",
        "null",
    )
    counts = [n_surgeries([*arguments, f"--trainer.callbacks={word}"]) for word in words]
    assert counts == [8, 8, 0, 0] and n_surgeries(arguments) == 0
    runs = [
        Run("vit_clean", "vision", method, "W4A8", kind, 0, method, (*arguments, f"--trainer.callbacks={words[0]}"))
        for method, kind in (("fp32", "fp32"), ("minmax", "ptq"), ("matched_noise(seed=1)", "ptq"))
    ]
    found, _ = plan(runs)
    assert found.models == 3 * 2 + 8 and found.evaluations == (3 * 2 + 8) * (1 + 1 * 3)
    costs = {"vit_clean": UnitCosts(1.0, 64)}
    without = plan([dataclasses.replace(run, arguments=tuple(arguments)) for run in runs])[0]
    ratio = [
        found.bytes_on_disk(costs, "none")[kind] / without.bytes_on_disk(costs, "none")[kind]
        for kind in ("results", "samples")
    ]
    assert ratio == pytest.approx([14 / 6] * 2)


def test_a_plan_counts_without_decoding(arguments, monkeypatch):
    from lightning_vlmq.data.images.files import FileImages

    def refuse(self, i):
        raise AssertionError("decoded")

    runs = [
        Run("vit_clean", scope, method, "W4A8", kind, 0, f"{method}{scope}", tuple(arguments))
        for method, kind, scope in (
            ("fp32", "fp32", "none"),
            ("minmax", "ptq", "vision"),
            ("minmax", "ptq", "vision_text"),
        )
    ]
    with monkeypatch.context() as patch:
        patch.setattr(FileImages, "decode", refuse)
        found, sets = plan(runs)
    assert found.images == {"id": 8, "far_ood": 5} and (found.n_sets, found.models_a_run, found.epochs) == (2, 2, 5)
    assert found.evaluations == 3 * 2 * (1 + 1 * 3)  # runs, logit scales, sets under their scores
    (cost,) = measure(runs, sets, False).values()
    assert cost.decode > 0 and cost.forward > 0 and cost.width > 8 and cost.preprocess.size == 32 and cost.is_measured
    with pytest.raises(VLMQError, match="nothing to run"):
        plan([])


def test_images_are_decoded_once_for_all_that_want_them_framed_alike():
    """By hand: 10 images; two VLMs want 10 pixels, one wants 20, one cannot be measured."""
    runs = [
        Run(vlm, "vision", method, "W4A8", kind, 0, f"{vlm}{method}", ())
        for vlm in ("a", "b", "c")
        for method, kind in (("fp32", "fp32"), ("minmax", "ptq"))
    ]
    found = Plan(runs, {"id": 10}, 1, 0, 1, 1, 0, 10, False, decoded_gb=1.0)
    small, large = Preprocess(10), Preprocess(20)
    costs = {name: UnitCosts(1.0, 64, decode=2.0, preprocess=small) for name in "ab"}
    costs["c"] = UnitCosts(1.0, 64, decode=5.0, preprocess=large)
    assert found.bytes_on_disk(costs, "none")["decoded images"] == 10 * (300 + 1200)
    assert found.seconds(costs, "none")["decoding"] == 10 * (2.0 + 5.0)
    squashed = {
        **costs,
        "b": UnitCosts(1.0, 64, decode=2.0, preprocess=dataclasses.replace(small, resize_mode="squash")),
    }
    assert found.bytes_on_disk(squashed, "none")["decoded images"] == 10 * (300 + 300 + 1200)
    assert found.seconds(squashed, "none")["decoding"] == 10 * (2.0 + 2.0 + 5.0)


def test_each_vlm_is_timed_as_it_wants_its_images(arguments):
    names = ("vit_clean", "ViT-B-32@openai", "hf-hub:someone/unknown")
    runs = [
        Run(name, "none", "fp32", "W32A32", "fp32", 0, name, (*arguments, "--data.image_size=null")) for name in names
    ]
    small, large, unknown = measure(runs, plan(runs)[1], False).values()
    assert (small.preprocess.size, large.preprocess.size, unknown.preprocess.size) == (64, 224, 224)
    assert (small.is_measured, large.is_measured, unknown.is_measured) == (True, True, False)
    assert large.forward > small.forward and unknown.forward == (small.forward + large.forward) / 2
    assert unknown.width == large.width and unknown.decode == (small.decode + large.decode) / 2


def test_a_vlm_is_framed_as_its_tag_says_though_its_weights_are_drawn(monkeypatch):
    """SigLIP's images are squashed, OpenAI's cut out: a set that is decoded once has two files."""
    small = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": small, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    tags = {"squashed": {"resize_mode": "squash", "interpolation": "bilinear"}, "cut": {"resize_mode": "shortest"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    framed = [_built(f"small@{tag}").preprocessing.framing for tag in tags]
    assert [(f.size, f.resize_mode, f.interpolation) for f in framed] == [
        (32, "squash", "bilinear"),
        (32, "shortest", "bicubic"),
    ]
    assert _built("small@/a/file.pt", "squashed").preprocessing.framing == framed[0]


def test_what_is_shared_costs_once():
    """By hand: an image a second, 10 images, 4 pairs; 64 features an image."""
    runs = [
        Run("vit_clean", scope, method, "W4A8", kind, 0, f"{method}{scope}", ())
        for method, kind, scope in (
            ("fp32", "fp32", "none"),
            ("minmax", "ptq", "vision"),
            ("minmax", "ptq", "vision_text"),
        )
    ]
    found = Plan(runs, {"id": 10}, 1, 4, 1, 1, 0, 10, False)
    costs = {"vit_clean": UnitCosts(1.0, 64)}
    seconds = {cache: found.seconds(costs, cache) for cache in ("all", "reference", "none")}
    assert seconds["reference"]["full precision"] == 10 and seconds["none"]["full precision"] == 30
    assert seconds["none"]["quantized models"] == pytest.approx(2 * seconds["reference"]["quantized models"])
    # nobody has been through the image tower of a scope that is alone
    alone = Plan([run for run in runs if run.scope != "vision"], {"id": 10}, 1, 4, 1, 1, 0, 10, False)
    assert alone.seconds(costs, "reference")["quantized models"] == seconds["reference"]["quantized models"]
    assert {cache: found.bytes_on_disk(costs, cache)["features"] for cache in seconds} == {
        "all": 2 * 14 * 64 * 4.0,
        "reference": 14 * 64 * 4.0,
        "none": 0.0,
    }
    local = Plan(
        runs, {"id": 4, "corruption": 6}, 2, 4, 1, 1, 0, 4, True
    )  # a score compares 9 patches of 4 of the images
    costs = {"vit_clean": UnitCosts(1.0, 64, patches=9)}
    assert local.seconds(costs, "reference")["full precision"] == 14
    assert local.bytes_on_disk(costs, "reference")["features"] == (14 + 9 * 4) * 64 * 4.0
    costs = {"vit_clean": UnitCosts(1.0, 64, decode=2.0, preprocess=Preprocess(10))}
    assert found.seconds(costs, "all")["decoding"] == 2.0 * 3 * (10 + 4)  # in every run
    half = Plan(runs, {"id": 10}, 1, 4, 1, 1, 0, 10, False, decoded_gb=1.5e-6)  # room for 5 of 10 images
    assert half.seconds(costs, "all")["decoding"] == pytest.approx(2.0 * (3 * (5 + 4) + 5))
    assert half.bytes_on_disk(costs, "all")["decoded images"] == pytest.approx(1500)
