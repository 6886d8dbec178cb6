"""The adapter and the zoo: names, checkpoints, features, and what goes wrong."""

import math

import pytest
import torch
from safetensors.torch import save_file

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.embedded.wording import all_phrases
from lightning_vlmq.models import load_vlm, zoo


@pytest.fixture(scope="module")
def vlm():
    return load_vlm("vit_clean")


def test_features_are_unit_norm_and_uint8_equals_float(vlm):
    pixels = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = vlm.encode_image(pixels)
        again = vlm.encode_image(pixels.float() / 255)
        text = vlm.encode_text(vlm.tokenize(["a drawing of a cat"]))
    assert torch.equal(features, again)
    assert torch.allclose(features.norm(dim=1), torch.ones(5))
    assert features.shape == (5, 256) and text.shape == (1, 256)


def test_preprocessing_matches_torchvision(vlm):
    from torchvision.transforms.functional import normalize

    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = vlm.model.encode_image(normalize(pixels / 255, zoo.PIXEL_MEAN, zoo.PIXEL_STD), normalize=True)
        assert torch.allclose(vlm.encode_image(pixels), expected, atol=1e-6)


def test_images_of_another_size_are_resized_as_by_open_clip(vlm):
    import numpy as np
    from PIL import Image
    from torchvision.transforms import functional as tf

    smooth = torch.rand(3, 6, 6)[None]
    pixels = (torch.nn.functional.interpolate(smooth, (160, 160), mode="bilinear") * 255).round().to(torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy()))
    by_pillow = tf.pil_to_tensor(image.resize((64, 64), Image.Resampling.BICUBIC))[None]
    with torch.no_grad():
        similarity = (vlm.encode_image(pixels) * vlm.encode_image(by_pillow)).sum()
    assert similarity > 0.999


def test_zero_shot_logits_and_class_features(vlm):
    names, templates = ["coat", "handbag", "dress"], ["a drawing of {}", "a {}"]
    with torch.no_grad():
        classes = vlm.class_features(names, templates)
        by_hand = torch.stack([vlm.encode_text(vlm.tokenize([t.format(n) for t in templates])).mean(0) for n in names])
        by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
        image = torch.nn.functional.normalize(torch.randn(4, 256), dim=1)
        logits = vlm.zero_shot_logits(image, classes)
    assert torch.allclose(classes, by_hand, atol=1e-6)
    assert torch.allclose(logits, vlm.model.logit_scale.exp() * image @ by_hand.T, atol=1e-4)


def test_caption_logits_are_those_of_open_clip():
    """CoCa's own forward drops the last token's prediction and encodes the image by itself."""
    torch.manual_seed(0)
    vlm = zoo.build("coca_clean").eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    tokens = vlm.tokenize(["a drawing of a cat", "a bag", "a"])
    with torch.no_grad():
        logits = vlm.caption_logits(vlm.image_tokens(pixels), tokens)
        own = vlm.model(vlm.preprocess(pixels), tokens)
    assert vlm.has_decoder and logits.shape == (3, 16, vlm.model.text.vocab_size)
    torch.testing.assert_close(logits[:, :-1], own["logits"])  # kernels differ by the shapes they are given
    assert torch.equal(own["labels"], tokens[:, 1:])


def test_only_coca_has_a_decoder():
    assert [tower for tower in zoo.TOWERS if zoo.build(f"{tower}_clean").has_decoder] == ["coca"]


def test_every_matrix_of_coca_is_drawn():
    """open_clip leaves the decoder's projection as it finds the memory."""
    projections = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        vlm = zoo.build("coca_clean")
        projections.append(vlm.model.text_decoder.text_projection.weight.detach())
    assert torch.equal(projections[0], projections[1]) and not torch.equal(projections[0], projections[2])
    assert projections[0].std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_logit_bias_of_a_sigmoid_trained_model_is_added():
    torch.manual_seed(0)
    vlm = zoo.build("siglip_clean").eval()
    image, text = torch.nn.functional.normalize(torch.randn(2, 4, 256), dim=-1)
    with torch.no_grad():
        logits = vlm.zero_shot_logits(image, text)
    torch.testing.assert_close(logits, math.exp(2.303) * image @ text.T - 10)


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.visual.transformer.resblocks.0.mlp.c_fc", "vision"),
        ("model.visual.proj.weight", "vision"),
        ("model.transformer.resblocks.1.attn.q_proj", "text"),
        ("model.token_embedding.weight", "text"),
        ("model.text_decoder.resblocks.0.attn.q_proj", "text"),
        ("model.logit_bias", None),
        ("model.logit_scale", None),
        ("model", None),
        ("mean", None),
    ],
)
def test_tower_of(vlm, name, tower):
    assert vlm.tower_of(name) == tower


def test_every_parameter_belongs_to_a_tower_but_the_scale(vlm):
    assert [n for n, _ in vlm.named_parameters() if vlm.tower_of(n) is None] == ["model.logit_scale"]


def test_open_clip_architecture_with_random_weights():
    torch.manual_seed(0)
    vlm = load_vlm("ViT-S-32-alt", "none")
    assert (vlm.name, vlm.pretrained, vlm.image_size) == ("ViT-S-32-alt", "none", 224)
    with torch.no_grad():
        assert vlm.encode_image(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).isfinite().all()


def test_checkpoint_of_an_open_clip_model_is_read_from_a_file(tmp_path):
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    vlm = load_vlm("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, actual = model.encode_image(pixels), vlm.model.encode_image(pixels)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


class TestTokenizer:
    def test_vocabulary_covers_every_phrase(self):
        tokenize = zoo.WordTokenizer(16)
        tokens = tokenize(all_phrases())
        assert not (tokens == 1).any()
        assert int(tokens.max()) == tokenize.vocab_size - 1

    def test_end_of_text_has_the_largest_id_and_unknown_words_map_to_one(self):
        tokens = zoo.WordTokenizer(16)(["a drawing of a quokka"])[0]
        assert int(tokens.argmax()) == int((tokens != 0).sum()) - 1
        assert (tokens == 1).sum() == 1

    def test_vocabulary_file_is_what_the_script_writes(self):
        import json
        import runpy
        from pathlib import Path

        script = Path(__file__).parents[2] / "scripts" / "make_words.py"
        made = runpy.run_path(str(script))["vocabulary"]()
        assert made == json.loads((zoo.FOLDER / "words.json").read_text(encoding="utf-8"))


class TestBadInput:
    def one_line(self, *args):
        with pytest.raises(VLMQError) as caught:
            load_vlm(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_unknown_model_names_the_nearest(self):
        assert "vit_clean" in self.one_line("vit_claen")
        assert "ViT-B-32" in self.one_line("ViT-B-23")

    def test_unknown_tag_names_the_nearest(self):
        assert "laion2b_s34b_b79k" in self.one_line("ViT-B-32", "laion2b_s34b_b78k")

    def test_missing_checkpoint(self, tmp_path):
        assert "does not exist" in self.one_line("vit_clean", str(tmp_path / "no.safetensors"))
        assert "does not exist" in self.one_line("ViT-B-32", str(tmp_path / "no.pt"))

    def test_truncated_checkpoint(self, tmp_path):
        whole = (zoo.FOLDER / "vit_clean.safetensors").read_bytes()
        for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut.safetensors").write_bytes(whole[:size])
            assert "cut.safetensors" in self.one_line("vit_clean", str(tmp_path / "cut.safetensors"))
        (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 no zip file")
        assert "cut.pt" in self.one_line("ViT-S-32-alt", str(tmp_path / "cut.pt"))

    def test_checkpoint_of_another_architecture(self):
        assert "does not fit" in self.one_line("vit_clean", str(zoo.FOLDER / "convnext_clean.safetensors"))

    def test_non_finite_weights_are_named(self, tmp_path):
        vlm = zoo.build("vit_clean")
        with torch.no_grad():
            vlm.get_parameter("model.visual.conv1.0.weight")[0, 0, 0, 0] = float("nan")
        save_file(vlm.state_dict(), tmp_path / "nan.safetensors")
        assert "model.visual.conv1.0.weight" in self.one_line("vit_clean", str(tmp_path / "nan.safetensors"))

    def test_unknown_zoo_model(self):
        with pytest.raises(VLMQError, match="vit_clean"):
            zoo.build("vit_clear")
