"""Every format that weights come in gives the features of the model that was saved; what fits not is refused in one line."""

import argparse
import json
import logging
import pickle
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import archives, recipes, weights
from lightning_vlmq.models.weights import fit, is_openais, is_script, read_weights

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def build(custom=False, vision=None, text=None, **more):
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(16, VISION | (vision or {}), TEXT | (text or {}), **more).eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build()


def features(model):
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return torch.cat([model.encode_image(x), model.encode_text(tokens)])


def assert_loads(model, path, tolerance=1e-5, custom=False):
    torch.manual_seed(1)
    fresh = build(custom)
    fit(fresh, path)
    torch.testing.assert_close(features(fresh), features(model), rtol=tolerance, atol=tolerance)
    return fresh


class Script(nn.Module):
    """A CLIP as OpenAI archived it: half precision, with its sizes as buffers and the causal mask as an attribute of blocks."""

    def __init__(self, model, sizes=("input_resolution", "context_length", "vocab_size")):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in sizes:
            self.register_buffer(name, torch.tensor(32))
        self.transformer.resblocks[0].attn_mask = torch.zeros(12, 12)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.logit_scale + self.visual.conv1.weight.sum() + self.transformer.resblocks[0].attn_mask.sum()


def write_script(model, path, traced, **sizes):
    import copy

    module = Script(copy.deepcopy(model).half(), **sizes)
    if traced:
        torch.jit.trace(module, torch.ones(1).half(), check_trace=False).save(str(path))
    else:
        shell = nn.Module()  # scripting needs source that compiles: hold the tensors in plain modules of the same names
        for name, tensor in module.state_dict().items():
            *folders, last = name.split(".")
            place = shell
            for folder in folders:
                if not hasattr(place, folder):
                    place.add_module(folder, nn.Module())
                place = getattr(place, folder)
            place.register_buffer(last, tensor)
        torch.jit.script(shell).save(str(path))


@pytest.mark.parametrize("traced", [True, False])
def test_torchscript_archives_are_read_without_running_them(model, tmp_path, monkeypatch, traced):
    path = tmp_path / "ViT.pt"
    write_script(model, path, traced)
    expected = dict(torch.jit.load(path).state_dict())

    def refuse(*_, **__):
        raise AssertionError("the archive's code was handed to the interpreter")

    monkeypatch.setattr(torch.jit, "load", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert is_script(path)
    state = read_weights(path)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name in model.state_dict())
    assert_loads(model, path, 2e-2)
    fresh = build()
    fit(fresh, path)
    assert all(torch.equal(a, b.half().float()) for a, b in zip(fresh.parameters(), model.parameters()))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("sizes", [("input_resolution", "context_length", "vocab_size"), ("input_resolution",), ()])
def test_only_openais_own_archives_are_taken_to_be_trained_as_openai_did(model, tmp_path, monkeypatch, traced, sizes):
    tags = {"openai": {"quick_gelu": True}, "other": {"quick_gelu": False}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip-of-the-tests", tags)
    path = tmp_path / "ViT.pt"
    write_script(model, path, traced, sizes=sizes)
    how = ("tiny-clip-of-the-tests", path, {}, None, None)
    assert is_script(path) and is_openais(path) == (len(sizes) == 3)
    if len(sizes) == 3:
        assert recipes.recipe_of_file(*how).quick_gelu
        return
    with pytest.raises(VLMQError, match=rf"^'{path}' does not say how it was trained.*set trained_like to one of .*$"):
        recipes.recipe_of_file(*how)


def test_files_that_are_no_archive_are_not_openais(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "w.pt")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert not is_openais(tmp_path / "w.pt") and not is_openais(tmp_path / "w.safetensors")


PREFIXES = ("", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.module.", "net.clip.")
CONTAINERS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {0: torch.ones(2)}}},
    "model": lambda s: {"model": s, "step": 4},
    "nested": lambda s: {"model": {"state_dict": s}},
    "strange": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1.0), "when": np.float64(3.0)},
    "options": lambda s: {
        "state_dict": s,
        "hyper_parameters": {"init_logit_scale": 2.6, "logit_scale": 4.6},
        "ema": {},
        "metrics": {"a": 1},
    },
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_and_prefixes(model, tmp_path, container, prefix):
    path = tmp_path / "weights.ckpt"
    torch.save(CONTAINERS[container]({prefix + name: t for name, t in model.state_dict().items()}), path)
    assert_loads(model, path)


def test_names_of_compiled_inner_modules(model, tmp_path):
    state = {n.replace("visual.", "visual._orig_mod."): t for n, t in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert_loads(model, tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_precisions(model, tmp_path, dtype, suffix):
    path = tmp_path / f"w{suffix}"
    state = {n: t.to(dtype) for n, t in model.state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    fresh = build()
    fit(fresh, path)
    assert all(torch.equal(p, state[n].float()) and p.dtype == torch.float32 for n, p in fresh.named_parameters())


def test_files_from_before_archives_and_clip_for_custom_text(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_loads(model, tmp_path / "old.pt")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert_loads(model, tmp_path / "w.pt", custom=True)


def test_views_that_share_a_storage(model, tmp_path):
    state = dict(model.state_dict())
    state["visual.proj"] = state["visual.proj"].T.contiguous().T
    state["logit_scale"] = torch.full((5,), 2.0)[3]
    torch.save(state, tmp_path / "w.pt")
    assert torch.equal(read_weights(tmp_path / "w.pt")["visual.proj"], model.visual.proj)
    assert read_weights(tmp_path / "w.pt")["logit_scale"] == 2


@pytest.mark.parametrize(
    ("vision", "text", "words"), [({"image_size": 48}, {}, "image size"), ({}, {"context_length": 20}, "context")]
)
def test_interpolation_is_said(model, tmp_path, caplog, vision, text, words):
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, "lightning_vlmq"):
        fit(build(vision=vision, text=text), tmp_path / "w.pt")
    assert words in caplog.text and "interpolated" in caplog.text
    caplog.clear()
    assert_loads(model, tmp_path / "w.pt")
    assert not caplog.text


class Evil:
    def __reduce__(self):
        return (print, ("run!",))


def test_nothing_in_a_file_is_run(model, tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": model.state_dict(), "hook": Evil()}, path, pickle_protocol=2)
    assert_loads(model, path)
    assert "run!" not in capsys.readouterr().out
    assert isinstance(archives.read_archive(path)["hook"], archives.Inert)


def refused(model, path):
    with pytest.raises(VLMQError) as caught:
        fit(model, path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and str(path) in message
    return message


def test_what_does_not_fit_is_named(model, tmp_path):
    def message(state):
        torch.save(state, tmp_path / "w.pt")
        return refused(build(), tmp_path / "w.pt")

    state = model.state_dict()
    assert "1 missing (visual.proj)" in message({n: t for n, t in state.items() if n != "visual.proj"})
    assert "1 left over (extra)" in message(state | {"extra": torch.ones(2)})
    assert "visual.proj is 3x4 for 32x16" in message(state | {"visual.proj": torch.ones(3, 4)})
    assert "floating point" in message(state | {"visual.proj": torch.ones(32, 16, dtype=torch.int8)})
    doubles = {name: tensor.double() for name, tensor in state.items()}  # said once, and hides nothing that comes after
    assert "floating point" in message(doubles | {"visual.proj": torch.ones(32, 16, dtype=torch.int8)})
    assert "several models" in message({f"{p}.{n}": t for p in ("student", "teacher") for n, t in state.items()})
    assert "no CLIP-like model" in message({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)})
    assert "holds no tensors" in message({"epoch": 3})
    assert "state_dict, model" in message({"state_dict": state, "model": state})
    assert "whole pickled model" in message({"model": model})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_weights_of_fewer_than_16_bits_are_refused(model, tmp_path, dtype):
    """Without their scales, which lie elsewhere, they mean nothing."""
    path = tmp_path / "w.safetensors"
    state = model.state_dict()
    save_file(state | {"visual.proj": state["visual.proj"].to(dtype)}, path)
    message = refused(build(), path)
    assert f"holds 'visual.proj' as {dtype}" in message and "16 bits or more, not quantized ones" in message
    save_file(state | {"visual.proj": state["visual.proj"].half()}, path)
    fit(build(), path)


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_averaged_weights_beside_the_trained_ones_are_not_chosen_between(model, tmp_path, container, prefix):
    state = {prefix + name: t for name, t in model.state_dict().items()}
    path = tmp_path / "w.ckpt"
    torch.save({"epoch": 3, container: state, "model_ema": {name: t + 1 for name, t in state.items()}}, path)
    assert f"weights under {container}, model_ema; save one of them alone" in refused(build(), path)
    torch.save({"epoch": 3, container: state, "optimizer": {"state": {0: torch.ones(2)}}}, path)
    assert_loads(model, path)


class TestShards:
    def write(self, folder, first, second, **where):
        """Two files and an index that says in which of them each tensor lies; ``where`` says otherwise."""
        parts = {"a.safetensors": first, "b.safetensors": second}
        for name, state in parts.items():
            save_file(state, folder / name)
        lies = {tensor: name for name, state in parts.items() for tensor in state}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": lies | where}))
        return index

    def halves(self, model):
        state = model.state_dict()
        names = list(state)
        return [{name: state[name] for name in part} for part in (names[::2], names[1::2])]

    @pytest.mark.parametrize("stale", ["a.safetensors", "b.safetensors"])
    def test_a_tensor_comes_from_the_file_that_the_index_names(self, model, tmp_path, stale):
        """Files of an older save that lie there still may hold it too."""
        first, second = self.halves(model)
        assert_loads(model, self.write(tmp_path, first, second))
        left, own = (first, second) if stale == "a.safetensors" else (second, first)
        name = next(name for name, t in own.items() if t.numel() > 1)
        left[name] = torch.randn_like(own[name])
        right = "b.safetensors" if stale == "a.safetensors" else "a.safetensors"
        assert_loads(model, self.write(tmp_path, first, second, **{name: right}))

    def test_a_tensor_that_only_another_file_holds_is_missing(self, model, tmp_path):
        first, second = self.halves(model)
        name = next(iter(second))
        index = self.write(tmp_path, first, second, **{name: "a.safetensors"})
        assert f"names 1 tensors that its files lack ({name}" in (said := refused(build(), index))
        assert "fetch it again" in said


def test_damage_is_told(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refused(build(), tmp_path / "cut.pt")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255  # in a tensor: the archive's checksum tells
    (tmp_path / "flip.pt").write_bytes(flipped)
    assert "damaged" in refused(build(), tmp_path / "flip.pt")
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.jpg", b"x")
    assert "none that torch wrote" in refused(build(), tmp_path / "photos.pt")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    refused(build(), tmp_path / "list.pkl")
    refused(build(), tmp_path / "missing.pt")


def test_other_tensors_beside_the_model_are_said(model, tmp_path, caplog):
    state = {f"model.{n}": t for n, t in model.state_dict().items()}
    torch.save({"state_dict": state | {"loss.margin": torch.ones(2)}}, tmp_path / "w.ckpt")
    with caplog.at_level(logging.WARNING, "lightning_vlmq"):
        assert_loads(model, tmp_path / "w.ckpt")
    assert "not loss" in caplog.text


def test_resampled_patches_of_big_vision_are_said(tmp_path, caplog):
    own = {
        "visual.trunk.patch_embed.proj.weight": torch.zeros(4, 3, 16, 16),
        "visual.trunk.pos_embed": torch.zeros(1, 4, 4),
    }
    same = {"params/img/embedding/kernel": np.zeros((16, 16, 3, 4)), "params/img/pos_embedding": np.zeros((1, 4, 4))}
    np.savez(tmp_path / "same.npz", **same)
    other = {"params/img/embedding/kernel": np.zeros((14, 14, 3, 4)), "params/img/pos_embedding": np.zeros((1, 9, 4))}
    np.savez(tmp_path / "other.npz", **other)
    weights._say_resampled(own, tmp_path / "same.npz")
    assert not caplog.records
    weights._say_resampled(own, tmp_path / "other.npz")
    said = [record.getMessage() for record in caplog.records]
    assert "from 14 to 16" in said[0] and "from 9 to 4" in said[1]
