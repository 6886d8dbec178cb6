"""A model is what its name says: weights, activation, preprocessing and provenance, or a refusal in one line."""

import json
import logging
import math
import re

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import digest
from lightning_vlmq.models import RANDOM, load_origin, load_vlm, openclip, origin, recipes, split_name, zoo

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY = "tiny-clip-of-the-tests"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An architecture of open_clip's list, small, with two tags that differ as OpenAI's and LAION's do, in files."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, CONFIG)
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    common = {"file": str(tmp_path / "weights.pt"), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    tags = {
        "quick": {**common, "quick_gelu": True, "resize_mode": "squash"},
        "plain": {**common, "resize_mode": "shortest"},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, tags)
    return tmp_path


def one_line(*args, **kwargs):
    with pytest.raises(VLMQError) as caught:
        load_vlm(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def activations(vlm):
    return {type(m).__name__ for m in vlm.modules() if isinstance(m, nn.GELU | open_clip.transformer.QuickGELU)}


class TestWeights:
    def test_an_architecture_without_weights_is_refused(self, tiny):
        assert "quick, plain" in (message := one_line(TINY)) and "none for random" in message

    def test_random_weights_only_by_the_word(self, tiny):
        torch.manual_seed(3)
        vlm = load_vlm(TINY, RANDOM)
        assert vlm.pretrained == "none" and vlm.provenance.is_random
        torch.manual_seed(3)
        assert load_vlm(TINY, RANDOM).provenance == vlm.provenance
        assert load_vlm(TINY, RANDOM).provenance != vlm.provenance
        assert load_vlm("vit_clean", RANDOM).provenance.is_random and not load_vlm("vit_clean").provenance.is_random

    @pytest.mark.parametrize("schema", ["local-dir:", "hf-hub:"])
    @pytest.mark.parametrize("option", ["pretrained", "trained_like", "activation"])
    def test_options_that_a_schema_ignores_are_refused(self, schema, option):
        assert option in one_line(f"{schema}some/where", **{option: "gelu"})

    def test_folders_without_weights_config_or_at_all(self, tmp_path):
        assert "does not exist" in one_line(f"local-dir:{tmp_path / 'no'}")
        assert "names no folder" in one_line("local-dir:")
        assert "open_clip_config.json" in one_line(f"local-dir:{tmp_path}")
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
        assert "holds no weights" in one_line(f"local-dir:{tmp_path}")
        for name in ("a.safetensors", "b.safetensors"):
            save_file(open_clip.CLIP(**CONFIG).state_dict(), tmp_path / name)
        assert "several files" in one_line(f"local-dir:{tmp_path}")
        (tmp_path / "open_clip_config.json").write_text("{")
        assert "no config" in one_line(f"local-dir:{tmp_path}")

    def test_a_repository_that_cannot_be_reached(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        message = one_line("hf-hub:nobody/nothing")
        assert "nobody/nothing" in message and "local-dir" in message

    def test_the_root_logger_stays_on(self, tiny, caplog):
        load_vlm(TINY, RANDOM)
        assert not logging.getLogger().disabled

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("ViT-B-32@openai", ("ViT-B-32", "openai")),
            ("ViT-B-32@/data/me@host/w.pt", ("ViT-B-32", "/data/me@host/w.pt")),
            ("local-dir:/mnt/me@host/clip", ("local-dir:/mnt/me@host/clip", None)),
            ("hf-hub:a/b@main", ("hf-hub:a/b@main", None)),
            ("vit_clean", ("vit_clean", None)),
        ],
    )
    def test_names_of_studies(self, text, parts):
        assert split_name(text) == parts


class TestRecipe:
    def test_the_tag_decides_activation_and_preprocessing(self, tiny):
        quick, plain = load_vlm(TINY, "quick"), load_vlm(TINY, "plain")
        assert activations(quick) == {"QuickGELU"} and activations(plain) == {"GELU"}
        assert quick.preprocessing.framing.resize_mode == "squash" and plain.preprocessing.framing.size == 32
        assert quick.preprocessing.mean == (0.5,) * 3
        assert quick.provenance.weights == plain.provenance.weights
        assert digest(quick.identity()) != digest(plain.identity())

    def test_an_architecture_that_disagrees_with_its_tag_is_refused(self, tiny, monkeypatch):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, CONFIG | {"quick_gelu": True})
        assert "activation: gelu or quick_gelu" in one_line(TINY, "plain")
        assert activations(load_vlm(TINY, "plain", activation="gelu")) == {"GELU"}
        assert activations(load_vlm(TINY, "plain", activation="quick_gelu")) == {"QuickGELU"}

    def test_a_file_is_asked_where_tags_differ(self, tiny):
        path = str(tiny / "weights.pt")
        assert "trained_like" in one_line(TINY, path)
        assert activations(load_vlm(TINY, path, "quick")) == {"QuickGELU"}
        assert load_vlm(TINY, path, "quick").preprocessing.framing.resize_mode == "squash"
        assert activations(load_vlm(TINY, path, "architecture")) == {"GELU"}
        assert "quick" in one_line(TINY, path, "quik")
        assert "leave it out" in one_line(TINY, "plain", "quick")

    def test_a_file_needs_no_word_where_tags_agree(self, tiny, monkeypatch):
        tags = open_clip.pretrained._PRETRAINED[TINY]
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"quick": tags["quick"]})
        assert activations(load_vlm(TINY, str(tiny / "weights.pt"))) == {"QuickGELU"}

    def test_every_offered_pair_has_a_recipe_or_a_reason(self):
        refused = []
        for name, tag in open_clip.list_pretrained():
            config = open_clip.get_model_config(name)
            try:
                recipe = recipes.recipe_of_tag(name, tag, config, None)
            except VLMQError:
                refused.append((name, tag))
                continue
            assert recipe.quick_gelu == bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        assert refused == [("roberta-ViT-B-32", "laion2b_s12b_b32k")]  # the only one where open_clip contradicts itself

    def test_published_preprocessing_is_that_of_open_clip(self, monkeypatch):
        """Against what open_clip attaches to the model it builds, without fetching its weights."""
        monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: "not fetched")
        for name, tag in (("ViT-B-16-SigLIP", "webli"), ("ViT-B-32", "openai"), ("ViT-L-14-CLIPA", "datacomp1b")):
            with torch.device("meta"):
                model = open_clip.create_model(name, tag, load_weights=False, device="meta")
            expected = open_clip.get_model_preprocess_cfg(model)
            seen = openclip.preprocessing(model, open_clip.get_pretrained_cfg(name, tag), name)
            size = expected["size"]
            assert seen.framing.size == (size[0] if isinstance(size, tuple) else size)
            assert (seen.framing.resize_mode, seen.framing.interpolation) == (
                expected["resize_mode"],
                expected["interpolation"],
            )
            assert (seen.mean, seen.std) == (tuple(expected["mean"]), tuple(expected["std"]))


class TestFolder:
    def folder(self, tmp_path, **preprocess):
        folder = tmp_path / "me@host" / "clip"
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}))
        torch.manual_seed(1)
        model = open_clip.CLIP(**CONFIG).eval()
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return folder, model

    def test_features_and_preprocessing_are_the_folders(self, tmp_path):
        folder, model = self.folder(
            tmp_path, mean=[0.1] * 3, resize_mode="longest", fill_color=9, interpolation="bilinear"
        )
        vlm = load_vlm(f"local-dir:{folder}")
        assert (vlm.preprocessing.framing.resize_mode, vlm.preprocessing.framing.fill) == ("longest", 9)
        assert vlm.preprocessing.mean == (0.1,) * 3 and vlm.provenance.source == "open_clip_model.safetensors"
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(vlm.model.encode_image(x), model.encode_image(x), rtol=1e-5, atol=1e-5)

    def test_is_built_again_from_its_origin(self, tmp_path):
        folder, model = self.folder(tmp_path)
        vlm = load_vlm(f"local-dir:{folder}")
        described = json.loads(json.dumps(origin(vlm)))
        assert digest(load_origin(described).identity()) == digest(vlm.identity())
        save_file({n: t + 0.1 for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        with pytest.raises(VLMQError, match="not those that the model was made from"):
            load_origin(described)

    @pytest.mark.parametrize("part", ["vision_cfg", "text_cfg"])
    @pytest.mark.parametrize("value", ["left out", None, [1, 2], "vit"])
    def test_a_config_without_a_tower_is_refused(self, tmp_path, part, value):
        folder, _ = self.folder(tmp_path)
        config = {k: v for k, v in CONFIG.items() if k != part} | ({} if value == "left out" else {part: value})
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        message = one_line(f"local-dir:{folder}")
        assert f"'{folder / 'open_clip_config.json'}' is no config of an open_clip model" in message and part in message

    @pytest.mark.parametrize(
        ("entries", "said"),
        [
            ({"fill_color": 0.5}, "fill is a grey level, a whole number"),
            ({"mean": [0.5, math.nan, 0.5]}, "mean has to be finite numbers"),
            ({"mean": [0.5, None, 0.5]}, "mean has to be finite numbers"),
            ({"std": ["0.5"] * 3}, "std has to be finite numbers"),
        ],
    )
    def test_numbers_of_preprocessing_that_are_none_are_refused(self, tmp_path, entries, said):
        folder, _ = self.folder(tmp_path, **entries)
        assert said in one_line(f"local-dir:{folder}")

    def test_a_mean_of_whole_numbers_or_one_for_all_channels_is_taken(self, tmp_path):
        folder, _ = self.folder(tmp_path, mean=[0, 0, 0], std=1, fill_color=255)
        seen = load_vlm(f"local-dir:{folder}").preprocessing
        assert (seen.mean, seen.std, seen.framing.fill) == ((0.0,) * 3, (1.0,) * 3, 255)

    def test_a_tokenizer_of_another_model_is_refused(self, tmp_path):
        """open_clip takes its own tokenizer, of 49408 tokens, where the config names none."""
        folder, _ = self.folder(tmp_path)
        assert load_vlm(f"local-dir:{folder}").tokenize(["a photo"]).max() == 49407  # the last one that is known
        small = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": 49407}}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": small}))
        save_file(open_clip.CLIP(**small).state_dict(), folder / "open_clip_model.safetensors")
        vlm = load_vlm(f"local-dir:{folder}")
        said = rf"^the tokenizer of '{re.escape(vlm.name)}' is another model's: .*token 49407, .* knows 49407; put the model's own.*$"
        with pytest.raises(VLMQError, match=said):
            vlm.tokenize(["a photo"])


@pytest.mark.parametrize(
    ("logarithm", "fits"), [(4.6052, True), (-3.0, True), (88.0, True), (100.0, False), (-200.0, False)]
)
def test_a_logit_scale_that_is_no_logarithm_is_refused(tiny, logarithm, fits):
    path = tiny / "weights.pt"
    state = torch.load(path)
    torch.save(state | {"logit_scale": torch.tensor(logarithm)}, path)
    if fits:
        scale = load_vlm(TINY, str(path), "architecture").logit_scale()
        torch.testing.assert_close(
            scale.detach().double(), torch.tensor(math.exp(logarithm)).double(), rtol=1e-4, atol=0
        )
        return
    message = one_line(TINY, str(path), "architecture")
    assert (
        f"the logit scale of '{TINY}' is e to the {logarithm:g}" in message and "weights hold the logarithm" in message
    )


@pytest.mark.parametrize("with_weights", [True, False])
def test_origin_keeps_what_the_tag_decided(tiny, with_weights):
    for vlm in (load_vlm(TINY, "quick"), load_vlm(TINY, str(tiny / "weights.pt"), "quick"), load_vlm("vit_clean")):
        again = load_origin(json.loads(json.dumps(origin(vlm))), with_weights)
        assert (again.preprocessing, again.pretrained) == (vlm.preprocessing, vlm.pretrained)
        assert activations(again) == activations(vlm)
        same = all(torch.equal(a, b) for a, b in zip(again.parameters(), vlm.parameters()))
        assert same == with_weights
    with pytest.raises(VLMQError, match="save the model again"):
        load_origin({})


def test_identity_is_of_the_content_not_the_place(tiny):
    (tiny / "elsewhere").mkdir()
    copy = tiny / "elsewhere" / "same.pt"
    copy.write_bytes((tiny / "weights.pt").read_bytes())
    first, second = load_vlm(TINY, str(tiny / "weights.pt"), "plain"), load_vlm(TINY, str(copy), "plain")
    assert digest(first.identity()) == digest(second.identity())
    with pytest.raises(VLMQError, match="load_vlm"):
        zoo.build("vit_clean").identity()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"interpolation": "nearest"}, "': 'nearest'"),
        ({"interpolation": "bicubik"}, "did you mean bicubic"),
        ({"mode": "L"}, "': 'L'; known: RGB"),
        ({"resize_mode": "longst"}, "did you mean longest"),
        ({"interpolations": "bicubic"}, "unknown entry of preprocess_cfg"),
        ({"size": 32, "mode": "RGB", "interpolation": "random", "mean": None}, "holds no weights"),
    ],
)
def test_preprocessing_that_open_clip_does_not_know_is_refused(tmp_path, entries, said):
    content = {"model_cfg": CONFIG, "preprocess_cfg": entries}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert said in one_line(f"local-dir:{tmp_path}")


def test_a_model_loads_without_a_warning(recwarn, caplog):
    load_vlm("vit_clean")
    assert not [str(w.message) for w in recwarn] and not caplog.messages
