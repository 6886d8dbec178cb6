"""``vlmq convert`` as a user runs it: quantize and save, convert, load; and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from cases.small_data import SMALL_DATA

from lightning_vlmq.cli import main
from lightning_vlmq.commands.card import Saved
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.lowbit.convert import load_converted
from lightning_vlmq.models import load_vlm, origin
from lightning_vlmq.quant import load_quantized
from lightning_vlmq.quant.outliers import rebuild, with_outliers

QUANTIZE = [
    "validate",
    "--config=configs/eval.yaml",
    "--model.quant.method=minmax",
    "--model.quant.weight_bits=4",
    "--data.datasets=[concepts]",
    *(f"--data.{key}={value}" for key, value in SMALL_DATA.items()),
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks+=lightning_vlmq.callbacks.QuantizedModelWriter",
]
QUICK = ["--data.n_concepts=16", "--rounds=2", "--batch=2"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a W4A8 model that ``vlmq validate`` saved."""
    folder = tmp_path_factory.mktemp("fake")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        main([*QUANTIZE, f"--results.root={folder / 'results'}", f"--trainer.callbacks.folder={folder / 'model'}"])
    return folder / "model"


def test_the_writer_saves_what_was_validated(fake: Path):
    assert load_quantized(load_vlm("vit_clean"), fake).scheme.weight_bits == 4


@pytest.mark.parametrize(("vlm", "outliers"), [("vit_clean", "12.5"), ("coca_clean", "stream")])
def test_a_model_with_planted_outliers_is_saved_converted_and_described(vlm, outliers, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    planted = [f"--model.vlm={vlm}", f"--model.outliers={outliers}"]
    saved, low = tmp_path / "model", tmp_path / "low"
    main([*QUANTIZE, *planted, f"--results.root={tmp_path}", f"--trainer.callbacks.folder={saved}"])
    assert Saved.read(saved).words == f"--model.vlm {vlm} --model.outliers {outliers}"
    main(["convert", f"--checkpoint={saved}", f"--out={low}", "--export=false", *QUICK])
    loaded, whole = (
        load_converted(low),
        with_outliers(load_vlm(vlm), "stream" if outliers == "stream" else float(outliers)),
    )
    assert loaded.name == whole.name == f"{vlm}+outliers{outliers}"
    load_quantized(whole, saved)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.cosine_similarity(loaded.encode_image(pixels), whole.encode_image(pixels)).min() > 0.999


@pytest.mark.parametrize("which", ["many", ""])
def test_outliers_that_a_name_does_not_say_are_refused(which):
    with pytest.raises(VLMQError, match=f"outlier channels by '{which}', which is no factor"):
        rebuild({**origin(load_vlm("vit_clean")), "name": f"vit_clean+outliers{which}"})


def test_nothing_is_saved_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    rest = [word for word in QUANTIZE if "quant." not in word]
    with pytest.raises(VLMQError, match="full precision"):
        main([*rest, f"--results.root={tmp_path}", f"--trainer.callbacks.folder={tmp_path / 'model'}"])
    assert not (tmp_path / "model").exists()


def test_convert_writes_checks_and_measures(fake: Path, tmp_path: Path, vlmq):
    out = tmp_path / "low"
    done = vlmq("convert", "--checkpoint", fake, "--out", out, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "file, MB" in done.stdout and "image encoder, ms" in done.stdout

    report = json.loads((out / "convert.json").read_text())
    files = {"model.safetensors", "convert.json", "image_encoder.pt2", "text_encoder.pt2"}
    assert {path.name for path in out.iterdir()} == files
    assert report["bytes"]["file"]["converted"] == (out / "model.safetensors").stat().st_size
    assert report["bytes"]["programs"]["image_encoder.pt2"] == (out / "image_encoder.pt2").stat().st_size
    plain = load_vlm("vit_clean")
    assert report["bytes"]["memory"]["fp32"] == sum(t.numel() * t.element_size() for t in plain.state_dict().values())
    assert report["bytes"]["file"]["fp32"] > report["bytes"]["memory"]["fp32"] > report["bytes"]["memory"]["converted"]
    assert report["agreement"]["images"] == 32 and report["agreement"]["top1"] >= 0.99
    assert set(report["latency_ms"]) == {"image"}, "the text encoder is out of scope"
    assert all(time["mean"] > 0 for time in report["latency_ms"]["image"].values())
    assert {layer["weight_bits"] for layer in report["layers"].values()} == {4}

    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    quantized, loaded = plain, load_converted(out)
    load_quantized(quantized, fake)
    with torch.no_grad():
        features = loaded.encode_image(pixels)
        assert torch.cosine_similarity(features, quantized.encode_image(pixels)).min() > 0.999
        program = torch.export.load(out / "image_encoder.pt2").module()
        assert torch.equal(program(pixels), features)


def test_a_second_conversion_leaves_nothing_of_the_first(fake: Path, tmp_path: Path):
    (tmp_path / "image_encoder.pt2").write_text("of another conversion")
    main(["convert", f"--checkpoint={fake}", f"--out={tmp_path}", "--kernels=own", "--export=false", *QUICK])
    assert not (tmp_path / "image_encoder.pt2").exists()
    kinds = {layer["kind"] for layer in json.loads((tmp_path / "convert.json").read_text())["layers"].values()}
    assert kinds == {"IntegerConv2d", "IntegerLinear"}


BAD = {
    "missing folder": (["--checkpoint=no/such"], "cannot read 'no/such/quant.json'"),
    "overwriting": (["--out={fake}"], "would overwrite"),
    "out is a file": (["--out={fake}/quant.json"], "cannot make folder"),
    "unknown activations": (["--activations=fixed"], "activations"),
    "unknown option": (["--colour=red"], "colour"),
    "no out": (["--out"], "out"),
    "float8 on a CPU": (["--float8=true"], "float8 needs a GPU"),
    "no such device": (["--device=tpu"], "device 'tpu' is not there"),
    "models that disagree": (["--min_top1=1.01"], "lower min_cosine and min_top1"),
    "no images a call": (["--batch=0"], "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case: str, fake: Path, tmp_path: Path):
    args, word = BAD[case]
    base = [f"--checkpoint={fake}", f"--out={tmp_path / 'low'}", *QUICK]
    with pytest.raises(VLMQError) as caught:
        main(["convert", *base, *(arg.replace("{fake}", str(fake)) for arg in args)])
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "low").glob("*"))


def test_help_and_exit_code(vlmq, tmp_path: Path):
    done = vlmq("convert", "--help")
    assert (
        done.returncode == 0 and "--activations" in done.stdout and "folder of the fake-quantized model" in done.stdout
    )
    done = vlmq("convert", "--checkpoint", tmp_path, "--out", tmp_path / "low")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("vlmq: error: cannot read")
