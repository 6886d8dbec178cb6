"""The package from Python: what the documents show, and what it refuses."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_vlmq as vlmq
from lightning_vlmq import api
from lightning_vlmq.core.errors import VLMQError

REPOSITORY = Path(__file__).parents[1]


def images(n, seed=0, size=64):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vlm():
    return vlmq.load_vlm("vit_clean")


def test_the_example_runs():
    assert doctest.testmod(api).failed == 0


def test_the_notebook_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "docs" / "python.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "python.ipynb", "exec"), names)
    assert {"top1", "ece", "auroc", "agreement"} <= set(names["table"]["metric"])


def test_numbers_are_those_of_the_records(vlm):
    pictures, labels = images(60), torch.arange(60) % 4
    names = ["shirt", "bag", "boot", "coat"]
    table = vlmq.evaluate(vlm, pictures, labels, names, near_ood=images(20, 1), far_ood=images(20, 2), scores=["msp"])
    with torch.no_grad():
        logits = vlm.zero_shot_logits(vlm.encode_image(pictures), vlm.class_features(names, ["a photo of a {}."]))
    expected = (logits.argmax(1) == labels).double().mean().item()
    assert table.query("metric == 'top1' and dataset == 'own'")["value"].item() == pytest.approx(expected)
    assert set(table.query("metric == 'auroc'")["role"]) == {"near_ood", "far_ood"}
    assert not table["metric"].str.startswith("delta_").any()
    same = vlmq.evaluate(vlm, pictures.movedim(1, -1).numpy(), labels.tolist(), names, scores=["msp"])
    assert (
        same.query("metric == 'nll' and dataset == 'own'")["value"].item()
        == table.query("metric == 'nll' and dataset == 'own'")["value"].item()
    )


def test_quantizing_leaves_the_model_as_it_is(vlm):
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    made = vlmq.quantize(vlm, "minmax", images(8), ["a photo of a bag"] * 8, weight_bits=3)
    assert made.quantization.weight_bits == 3 and made.coverage.weight_share(("vision",)) > 0.95
    assert all(torch.equal(value, before[name]) for name, value in vlm.state_dict().items())
    table = vlmq.evaluate(made, images(30, 3), [0, 1] * 15, ["bag", "boot"])
    assert {"agreement", "delta_top1"} <= set(table["metric"])


def test_files_and_pictures_of_any_size(vlm, tmp_path):
    pictures = [Image.fromarray(np.full((40 + 9 * k, 70, 3), 20 * k, np.uint8)) for k in range(6)]
    files = [tmp_path / f"{k}.png" for k in range(6)]
    for picture, file in zip(pictures, files):
        picture.save(file)
    tables = [vlmq.evaluate(vlm, given, [0, 1] * 3, ["bag", "boot"], scores=[]) for given in (pictures, files)]
    assert tables[0].equals(tables[1])


def test_pictures_are_read_as_files_of_data_sets_are(vlm, tmp_path):
    """16 bits are scaled, EXIF is followed, and of palettes and transparency open_clip's pixels are taken."""
    framing = vlm.preprocessing.framing
    grey = np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) * 25
    Image.fromarray(grey).save(tmp_path / "16.png")
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    stored.quantize(8).save(tmp_path / "palette.png", transparency=3)
    read = api._pixels([tmp_path / f"{name}.png" for name in ("16", "turned", "palette")], framing)
    scaled = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    palette = Image.open(tmp_path / "palette.png")
    for pixels, shown in zip(read, (scaled, stored.transpose(Image.Transpose.ROTATE_270), palette)):
        assert np.array_equal(pixels.permute(1, 2, 0), np.array(framing(shown).convert("RGB")))
    assert len(read[0].unique()) > 50
    picture = Image.open(tmp_path / "turned.png")
    assert torch.equal(api._pixels([picture, picture], framing)[1], read[1])  # a picture stays open


def test_what_is_no_picture_is_named(vlm, tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    whole = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:45])
    for bad, reason in (
        (tmp_path / "two.gif", r"two\.gif'\) cannot be read: it has 2 frames"),
        (Image.fromarray(np.zeros((32, 32), np.float32)), "floating-point"),
        (tmp_path / "cut.png", r"cut\.png'\) cannot be read"),
        (7, "a int"),
    ):
        with pytest.raises(VLMQError, match=reason) as caught:
            api._pixels([whole, bad], vlm.preprocessing.framing)
        assert "image 1 (" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 5, 0]}, "labels must be 0 to 1"),
        ({"labels": [0, 1]}, "every image needs one label"),
        ({"images": torch.rand(4, 3, 8, 8)}, "images must be uint8"),
        ({"images": []}, "no images"),
        ({"images": ["no/such.png"] * 4}, r"image 0 \('no/such.png'\) cannot be read"),
        ({"scores": ["mcn"]}, "mcm"),
    ],
)
def test_bad_input(vlm, change, message):
    good = {"images": images(4), "labels": [0, 1, 0, 1], "class_names": ["bag", "boot"]}
    with pytest.raises(VLMQError, match=message):
        vlmq.evaluate(vlm, **{**good, **change})


@pytest.mark.parametrize(
    ("method", "captions", "message"),
    [
        ("minmx", 4, "minmax"),
        ("lsq_contrastive", 4, "vlmq fit"),
        ("fp32", 4, "nothing"),
        ("minmax", 3, "one caption per image"),
    ],
)
def test_what_cannot_be_quantized(vlm, method, captions, message):
    with pytest.raises(VLMQError, match=message):
        vlmq.quantize(vlm, method, images(4), ["a bag"] * captions)


def test_the_package_has_no_other_names():
    assert set(vlmq.__all__) <= set(api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = vlmq.quantise
