"""Folders of transformers' save_pretrained, with random weights: features, pixels and refusals against that library itself."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images import Preprocess
from lightning_vlmq.models import load_vlm, processors
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.quant.attention import attention_products

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "photo", "of", "cat", "dog", "two", "dogs"]
TEXT = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = ["a photo of a cat", "two dogs"]


def tokenizer(length: int, words=WORDS):
    """A tokenizer of whole words that ends each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=length
    )


def made(kind: str):
    """Model, image processor and text length of a family at a tiny size."""
    t, c = transformers, {"max_position_embeddings": 12}
    if kind == "clip":
        config = t.CLIPConfig(text_config=TEXT | IDS | c, vision_config=VISION | {"image_size": 32}, projection_dim=24)
        return t.CLIPModel(config), t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), 12
    if kind == "siglip":
        config = t.SiglipConfig(text_config=TEXT | IDS | c, vision_config=VISION | {"image_size": 32})
        return t.SiglipModel(config), t.SiglipImageProcessor(size={"height": 32, "width": 32}), 12
    if kind == "siglip2":
        config = t.Siglip2Config(text_config=TEXT | IDS | c, vision_config=VISION | {"num_patches": 16})
        return t.Siglip2Model(config), t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), 12
    config = t.AlignConfig(
        text_config=TEXT | IDS | {"max_position_embeddings": 80},
        vision_config={
            "image_size": 32, "hidden_dim": 32, "in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 5],
            "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 4], "depthwise_padding": [],
            "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 8,
        },
        projection_dim=24,
    )  # fmt: skip
    processor = t.EfficientNetImageProcessor(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}, do_center_crop=True, do_normalize=False,
        rescale_factor=1 / 127.5, rescale_offset=True, include_top=False, resample=2,
    )  # fmt: skip
    return t.AlignModel(config), processor, 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder a family, each saved by transformers; and what was saved."""
    folders = {}
    for kind in ("clip", "siglip", "siglip2", "align"):
        torch.manual_seed(0)
        model, processor, length = made(kind)
        folder = tmp_path_factory.mktemp("hf") / kind
        model.eval().save_pretrained(folder)
        tokenizer(length).save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[kind] = (folder, model, processor, length)
    return folders


def photo(height=50, width=75):
    smooth = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)


def pooled(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "align"])
def test_features_are_those_of_transformers(saved, kind):
    folder, model, processor, length = saved[kind]
    vlm = load_vlm(f"local-dir:{folder}")
    framed = vlm.preprocessing.framing(photo(32, 32) if kind == "siglip2" else photo())
    pixels = torch.from_numpy(np.array(framed)).permute(2, 0, 1)[None]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = theirs(TEXTS, padding="max_length", max_length=length, return_tensors="pt")
    seen = {"pixel_values": vlm.preprocess(pixels)}
    if kind == "siglip2":
        seen = processor(photo(32, 32), return_tensors="pt")
    text = {"input_ids": tokens["input_ids"]}
    if kind == "align":
        text["attention_mask"] = tokens["attention_mask"]
    with torch.no_grad():
        image = torch.nn.functional.normalize(pooled(model.get_image_features(**seen)), dim=-1)
        words = torch.nn.functional.normalize(pooled(model.get_text_features(**text)), dim=-1)
        torch.testing.assert_close(vlm.encode_image(pixels), image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vlm.encode_text(vlm.tokenize(TEXTS)), words, rtol=1e-5, atol=1e-5)
        logits = model(**seen, **text).logits_per_image
        torch.testing.assert_close(vlm.zero_shot_logits(image, words), logits, rtol=1e-4, atol=1e-4)
    assert vlm.is_sigmoid == kind.startswith("siglip")


@pytest.mark.parametrize("kind", ["clip", "siglip", "align"])
def test_pixels_are_those_of_the_image_processor(saved, kind):
    folder, _, processor, _ = saved[kind]
    vlm = load_vlm(f"local-dir:{folder}")
    pixels = torch.from_numpy(np.array(vlm.preprocessing.framing(photo()))).permute(2, 0, 1)[None]
    theirs = processor(photo(), return_tensors="pt")["pixel_values"]
    # Pillow and torchvision round differently when they resize
    assert (vlm.preprocess(pixels) - theirs).abs().max() < 2.01 / 255 / min(vlm.preprocessing.std)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("mode", ["P", "RGBA", "1"])
def test_pixels_of_palette_and_transparent_images_too(saved, kind, mode):
    """transformers makes them RGB before it resizes, on white."""
    folder, _, processor, _ = saved[kind]
    vlm = load_vlm(f"local-dir:{folder}")
    picture = photo().quantize(8) if mode == "P" else photo().convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray((np.arange(50 * 75).reshape(50, 75) % 256).astype(np.uint8)))
    pixels = Preprocess.of(vlm.preprocessing.framing)(picture)[None]
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    assert (vlm.preprocess(pixels) - theirs).abs().max() < 2.01 / 255 / min(vlm.preprocessing.std)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "align"])
@pytest.mark.parametrize("method", ["minmax", "gptq", "quarot"])
def test_every_weight_is_quantized(saved, kind, method):
    vlm = load_vlm(f"local-dir:{saved[kind][0]}")
    size = vlm.image_size
    batch = {
        "image": torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8),
        "tokens": vlm.tokenize(TEXTS * 2),
    }
    report = quantize(vlm, method, QuantScheme(8, 8, scope="vision_text"), [batch]).coverage
    assert report.weight_share() == 1, report.unquantized


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "align"])
def test_products_of_attention_are_quantized_or_the_reason_is_one_line(saved, kind):
    """ALIGN's text tower writes its products out, SigLIP 2 pools by torch's own attention module: nothing stands in for these."""
    vlm = load_vlm(f"local-dir:{saved[kind][0]}")
    size = vlm.image_size
    batch = {"image": torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8), "tokens": vlm.tokenize(TEXTS * 2)}
    with torch.no_grad():
        full = [vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])]
    scheme = QuantScheme(8, 8, scope="vision_text", attention="int8")
    if kind in ("siglip2", "align"):
        with pytest.raises(VLMQError, match=r"of the products of activations stay in float.*set attention to float"):
            quantize(vlm, "minmax", scheme, [batch])
        return
    report = quantize(vlm, "minmax", scheme, [batch]).coverage
    products = [row for row in report.rows if row.layer_type == "activation_product"]
    assert {row.tower for row in products} == {"vision", "text"}
    assert all(row.macs_quantized == row.macs > 0 for row in products) and attention_products(vlm)
    with torch.no_grad():
        for ours, theirs in zip([vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])], full):
            assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.98 and not torch.equal(ours, theirs)


def test_shards_low_precision_and_bin_files(saved, tmp_path):
    folder, model, _, length = saved["clip"]
    expected = load_vlm(f"local-dir:{folder}").provenance.weights
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    half = made("clip")[0].half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "half")
    for name in ("shards", "half"):
        tokenizer(length).save_pretrained(tmp_path / name)
        saved["clip"][2].save_pretrained(tmp_path / name)
    assert load_vlm(f"local-dir:{tmp_path / 'shards'}").provenance.weights == expected
    halved = load_vlm(f"local-dir:{tmp_path / 'half'}")
    assert all(p.dtype == torch.float32 for p in halved.parameters())


def broken(saved, tmp_path, kind="clip"):
    folder = tmp_path / "broken"
    shutil.copytree(saved[kind][0], folder)
    return folder


def one_line(folder):
    with pytest.raises(VLMQError) as caught:
        load_vlm(f"local-dir:{folder}")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_what_is_missing_is_named(saved, tmp_path, monkeypatch):
    folder = broken(saved, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in one_line(folder)
    shutil.copy(saved["clip"][0] / "preprocessor_config.json", folder)
    for file in folder.glob("token*"):
        file.unlink()
    assert "tokenizer.json" in one_line(folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in state.items() if "visual_projection" not in n}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "visual_projection" in one_line(folder) and "1 missing" in one_line(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 40)
    assert "model.safetensors" in one_line(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in one_line(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    assert "clip" in one_line(folder)
    (folder / "config.json").write_text("{")
    assert "no config" in one_line(folder)


def test_quantized_weights_are_refused(saved, tmp_path):
    folder = broken(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    message = one_line(folder)
    assert f"'{folder}' holds quantized weights (quantization_config)" in message and "as it was before" in message
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    load_vlm(f"local-dir:{folder}")


@pytest.mark.parametrize("kind", [["clip"], {"clip": 1}, None, 3])
def test_a_type_of_model_that_is_no_word_is_refused(saved, tmp_path, kind):
    folder = broken(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    assert f"unknown model type of transformers in '{folder / 'config.json'}': '{kind}'" in one_line(folder)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")],
)
def test_weights_of_fewer_than_16_bits_are_refused(saved, tmp_path, dtype, said):
    """transformers would widen them without their scales."""
    folder = broken(saved, tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "visual_projection.weight"
    save_file(state | {name: state[name].to(dtype)}, path, {"format": "pt"})
    message = one_line(folder)
    assert f"'{path}' holds '{name}' as {said}; give weights in floating point of 16 bits or more" in message
    for float_type in (torch.float16, torch.bfloat16, torch.float64):
        save_file(state | {name: state[name].to(float_type)}, path, {"format": "pt"})
        assert load_vlm(f"local-dir:{folder}").model.visual.projection.weight.dtype == torch.float32


def test_the_weights_that_are_read_count_alone(saved, tmp_path):
    folder = broken(saved, tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    quantized = state | {"visual_projection.weight": state["visual_projection.weight"].to(torch.int8)}
    save_file(quantized, folder / "model_int8.safetensors", {"format": "pt"})
    (folder / "a.safetensors").write_bytes(b"damaged")
    load_vlm(f"local-dir:{folder}")
    save_file(quantized, path, {"format": "pt"})
    assert f"'{path}' holds" in one_line(folder)
    path.unlink()
    (folder / "model_int8.safetensors").unlink()
    (folder / "a.safetensors").unlink()
    torch.save(quantized, folder / "pytorch_model.bin")
    assert f"'{folder / 'pytorch_model.bin'}' holds 'visual_projection.weight' as torch.int8" in one_line(folder)
    torch.save(state, folder / "pytorch_model.bin")
    load_vlm(f"local-dir:{folder}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_positions_that_older_folders_hold_are_no_weights(saved, tmp_path, dtype):
    folder = broken(saved, tmp_path)
    path = folder / "model.safetensors"
    expected = load_vlm(f"local-dir:{folder}").provenance.weights
    positions = {
        "text_model.embeddings.position_ids": torch.arange(12)[None].to(dtype),
        "vision_model.embeddings.position_ids": torch.arange(17)[None].to(dtype),
    }
    save_file(load_file(path) | positions, path, {"format": "pt"})
    assert load_vlm(f"local-dir:{folder}").provenance.weights == expected


def test_numbers_of_batches_are_no_weights(saved):
    """ALIGN's batch norm counts them, in whole numbers."""
    folder = saved["align"][0]
    counts = [n for n, t in load_file(folder / "model.safetensors").items() if not t.is_floating_point()]
    assert counts and all(name.endswith("num_batches_tracked") for name in counts)
    load_vlm(f"local-dir:{folder}")


def test_weights_of_another_shape_are_named(saved, tmp_path):
    folder = broken(saved, tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    for name in ("visual_projection.weight", "text_projection.weight"):
        save_file(state | {name: torch.randn(23, 32)}, path, {"format": "pt"})
        message = one_line(folder)
        assert f"the weights in '{folder}' do not fit its config: 1 mismatched keys" in message
        assert name in message and "fetch the folder again" in message
    save_file(state | {"visual_projection.weight": torch.randn(24, 32)}, path, {"format": "pt"})
    load_vlm(f"local-dir:{folder}")


def test_aligns_padding_is_what_its_model_looks_away_from(saved, tmp_path):
    folder = broken(saved, tmp_path, "align")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[EOS]"}))
    message = one_line(folder)
    assert f"the tokenizer in '{folder}' pads with token 2, its model looks away from 0" in message
    assert "correct pad_token in its tokenizer_config.json" in message
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PAD]"}))
    load_vlm(f"local-dir:{folder}")


def test_other_models_see_their_padding(saved, tmp_path):
    """SigLIP's own tokenizer pads with another token than its config says."""
    folder = broken(saved, tmp_path, "siglip")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[UNK]"}))
    assert load_vlm(f"local-dir:{folder}").tokenize(["a"])[0, -1] == 1


@pytest.mark.parametrize("entries", [{"image_mean": None}, {"image_std": None}, {"rescale_factor": None}])
def test_an_incomplete_processor_is_refused(saved, entries, monkeypatch):
    folder, _, processor, _ = saved["clip"]
    for entry, value in entries.items():
        monkeypatch.setattr(processor, entry, value)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda *_, **__: processor)
    message = one_line(folder)
    assert f"the image processor in '{folder}' is incomplete" in message and "preprocessor_config.json" in message


def test_one_mean_is_that_of_all_channels(saved, monkeypatch):
    folder, _, processor, _ = saved["clip"]
    monkeypatch.setattr(processor, "image_mean", 0.5)
    monkeypatch.setattr(processor, "image_std", 0.25)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda *_, **__: processor)
    seen = load_vlm(f"local-dir:{folder}").preprocessing
    assert seen.mean == pytest.approx((0.5,) * 3) and seen.std == pytest.approx((0.25,) * 3)


@pytest.mark.parametrize("entry", ["do_pad", "do_flip_channel_order"])
def test_what_is_not_done_here_is_refused(saved, monkeypatch, entry):
    folder, _, processor, _ = saved["clip"]
    monkeypatch.setattr(processor, entry, True, raising=False)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda *_, **__: processor)
    assert f"has {entry}, which is not supported" in one_line(folder)


def test_sizes_as_old_configs_write_them(saved, tmp_path):
    folder = broken(saved, tmp_path)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"size": 32, "crop_size": 32, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    assert load_vlm(f"local-dir:{folder}").preprocessing.mean == (0.0,) * 3


class TestTokenizers:
    """Of whole words, here with more words than a model has."""

    def folder(self, tmp_path, words, patch_size=8, vocabulary=40):
        t = transformers
        config = t.CLIPConfig(
            text_config=TEXT | IDS | {"max_position_embeddings": 12, "vocab_size": vocabulary},
            vision_config=VISION | {"image_size": 32, "patch_size": patch_size},
            projection_dim=24,
        )
        folder = tmp_path / "clip"
        t.CLIPModel(config).save_pretrained(folder)
        tokenizer(12, words).save_pretrained(folder)
        t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        return load_vlm(f"local-dir:{folder}")

    def test_of_another_model_are_refused(self, tmp_path):
        vlm = self.folder(tmp_path, [*WORDS, *(f"w{k}" for k in range(40))])
        assert vlm.tokenize(["a w29"]).max() == 39  # the last one that the model knows
        said = rf"^the tokenizer of '{re.escape(vlm.name)}' is another model's: .*token 40, .* knows 40; put the model's own.*$"
        with pytest.raises(VLMQError, match=said):
            vlm.tokenize(["a cat", "a w30"])

    def test_an_embedding_of_the_vision_tower_is_no_vocabulary(self, tmp_path):
        vlm = self.folder(tmp_path, WORDS, patch_size=16)
        (positions,) = (m for m in vlm.model.visual.modules() if isinstance(m, torch.nn.Embedding))
        tokens = vlm.tokenize(TEXTS)
        assert positions.num_embeddings == 5 <= tokens.max()
        assert vlm.encode_text(tokens).shape == (2, 24)

    def test_an_embedding_of_positions_is_no_vocabulary(self, tmp_path):
        vlm = self.folder(tmp_path, [*WORDS, *(f"w{k}" for k in range(9))], vocabulary=19)
        assert vlm.tokenize(["w8"]).max() == 18


def test_a_processor_for_another_size_is_refused(saved, tmp_path):
    folder = broken(saved, tmp_path)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"crop_size": {"height": 48, "width": 48}, "size": {"shortest_edge": 48}}))
    assert "48 pixels for a model of 32" in one_line(folder)
    path.write_text(json.dumps(config | {"do_resize": False}))
    assert "not supported" in one_line(folder)


@pytest.mark.parametrize(
    ("size", "crop", "said"),
    [
        ({"longest_edge": 32}, {}, "resizes to {'longest_edge': 32}"),
        ({"max_height": 32, "max_width": 32}, {}, "resizes to {'max_height'"),
        ({"shortest_edge": 32, "longest_edge": 64}, {"height": 32, "width": 32}, "resizes to {'shortest_edge'"),
        ({"height": 32, "width": 40}, {}, "resizes to {'height'"),
        ({}, {"height": 32, "width": 32}, "resizes to no size"),
        ({"shortest_edge": 32}, {"shortest_edge": 32}, "cuts out {'shortest_edge'"),
        ({"shortest_edge": 32}, {"height": 32, "width": None}, "cuts out {'height': 32}"),
        ({"shortest_edge": 32}, {"height": 48, "width": 48}, "cuts 48 pixels out of 32"),
        ({"shortest_edge": 32}, {}, "keeps the ratio"),
    ],
)
def test_other_sizes_of_processors_are_refused(size, crop, said):
    with pytest.raises(VLMQError) as caught:
        processors.framing_of(size, crop, "bicubic", VLMQError)
    assert said in str(caught.value)


def test_a_processor_without_a_way_to_resize_or_a_size_is_refused(saved):
    folder, model, processor, _ = saved["clip"]
    for entry, said in (("resample", "resizes by Pillow's method None"), ("size", "resizes to no size")):
        kept = getattr(processor, entry)
        setattr(processor, entry, None)
        try:
            with pytest.raises(VLMQError, match=said):
                processors.preprocessing_of(model.config, processor, folder)
        finally:
            setattr(processor, entry, kept)


def test_without_transformers_the_message_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install 'lightning_vlmq[hf]'" in one_line(saved["clip"][0])
