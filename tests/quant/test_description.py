"""Whatever becomes of quant.json or the tensors beside it: one line, and never another model; what a file names is not fetched."""

from __future__ import annotations

import json
import re
import socket
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases.quant import build, make_batches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_vlmq.cli import main
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.tensorfiles import read_tensor_file
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.lowbit.convert import load_converted
from lightning_vlmq.models.weights import read_weights
from lightning_vlmq.quant import QuantScheme, load_quantized, quantize, quantized_layers, save_quantized
from lightning_vlmq.quant.checkpoint import FORMAT, read_description
from lightning_vlmq.quant.description import described, sealed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vlm = build("vit_clean")
    path = tmp_path_factory.mktemp("saved")
    save_quantized(vlm, path, quantize(vlm, "smoothquant", QuantScheme(4, 8), make_batches(vlm)), {"note": "x"})
    return path


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "quant.json").read_text())


@pytest.fixture(scope="module")
def vlm():
    return build("vit_clean")


def fields(node, path=()):
    """Paths of everything in nested JSON; of lists and of mappings with many alike entries the first alone."""
    yield path
    if isinstance(node, dict):
        names = list(node)[:1] if len(node) > 15 else list(node)
        for name in names:
            yield from fields(node[name], (*path, name))
    elif isinstance(node, list) and node:
        yield from fields(node[0], (*path, 0))


def changed(content, path, value):
    """A deep copy with another value at a path; ``...`` removes it."""
    copy = json.loads(json.dumps(content))
    node = copy
    for step in path[:-1]:
        node = node[step]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copy


def refused(call, *args):
    with pytest.raises(VLMQError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_read(content):
    assert asdict(described(content, Path("x")).scheme)["weight_bits"] == 4


@pytest.mark.parametrize("value", [..., None, "yes", -1, 2.5, True, [], {}, [[1]], {"a": 1}], ids=repr)
def test_every_field_missing_or_of_another_type(content, value):
    tried = 0
    for path in fields(content):
        if not path or path == ("digest",) or path[0] == "extra" or path[:1] == ("options",):
            continue  # free content: the digest alone guards it
        node = content
        for step in path:
            node = node[step]
        if (value is not ... and type(value) is type(node)) or (value is ... and isinstance(path[-1], int)):
            continue
        bad = changed(content, path, value)
        assert path[-1] == 0 or re.search("description|changed", refused(described, bad, Path("quant.json")))
        bad.pop("digest", None)
        try:  # sealed anew, as somebody who means harm would: of the right types, or refused by name
            described(sealed(bad), Path("quant.json"))
        except VLMQError as error:
            assert str(path[0]) in str(error) or "description" in str(error)
        tried += 1
    assert tried > 40


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_nothing_that_was_changed_is_read(content, data):
    paths = [path for path in fields(content) if path]
    bad = changed(content, data.draw(st.sampled_from(paths)), data.draw(JSON))
    if json.dumps(bad, sort_keys=True) != json.dumps(content, sort_keys=True):
        refused(described, bad, Path("quant.json"))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(text=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_as_a_description(folder, tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(text)
    try:
        found = read_description(path, FORMAT)
    except VLMQError as error:
        assert "\n" not in str(error)
    else:
        refused(described, found, path)


@pytest.mark.parametrize("depth", [1_000, 100_000])
@pytest.mark.parametrize("where", ["all", "extra", "layers"])
def test_nesting_without_end(folder, content, depth, where, tmp_path, vlm):
    nest = "[" * depth + "]" * depth
    text = nest if where == "all" else json.dumps({**content, where: "NEST"}).replace('"NEST"', nest)
    (tmp_path / "quant.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused(load_quantized, vlm, tmp_path)
    assert not quantized_layers(vlm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "method": "mine"}, "unknown method"),
        (lambda c: {**c, "options": {"alpha": "much"}}, "alpha"),
        (lambda c: {**c, "options": {"mine": 1}}, "unknown option"),
        (lambda c: {**c, "rotated_streams": ["sound"]}, "unknown tower"),
        (
            lambda c: {**c, "layers": {k: {**v, "input_transform": "exec"} for k, v in c["layers"].items()}},
            "input transform",
        ),
        (lambda c: {**c, "layers": {}}, "whose layers are not"),
        (lambda c: {**c, "tensors": "0" * 32}, "not the file that was saved with"),
    ],
)
def test_well_formed_but_wrong(folder, content, change, message, tmp_path):
    bad = change(content)
    bad.pop("digest")
    (tmp_path / "quant.json").write_text(json.dumps(sealed(bad)))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert message in refused(load_quantized, build("vit_clean"), tmp_path)


def test_a_flipped_bit_of_the_weights_is_seen(folder, tmp_path, vlm):
    (tmp_path / "quant.json").write_bytes((folder / "quant.json").read_bytes())
    good = bytearray((folder / "model.safetensors").read_bytes())
    generator = torch.Generator().manual_seed(0)
    for bit in torch.randint(0, 8 * len(good), (40,), generator=generator).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "model.safetensors").write_bytes(bad)
        refused(load_quantized, vlm, tmp_path)
    assert not quantized_layers(vlm)


def header(content, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


ANY_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "BOOL", "C64"]),
        "shape": st.lists(st.integers(-2, 2**40), max_size=3),
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2),
    }
)
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "empty": b"",
    "length alone": struct.pack("<Q", 8),
    "length beyond the file": header({}, 2**40),
    "largest length": header({}, 2**64 - 1),
    "no JSON": header(b"\xff" * 20),
    "nested": header(b"[" * 100_000 + b"]" * 100_000),
    "a list": header([]),
    "offsets beyond the file": header({"a": {**ENTRY, "data_offsets": [0, 10**12]}}),
    "offsets backwards": header({"a": {**ENTRY, "data_offsets": [8, 0]}}) + bytes(8),
    "negative": header({"a": {**ENTRY, "shape": [-2]}}) + bytes(8),
    "huge shape": header({"a": {**ENTRY, "shape": [2**62, 2**62]}}) + bytes(8),
    "overlapping": header({"a": ENTRY, "b": ENTRY}) + bytes(8),
    "unknown type": header({"a": {**ENTRY, "dtype": "X9"}}) + bytes(8),
    "text as shape": header({"a": {**ENTRY, "shape": "2"}}) + bytes(8),
    "missing data": header({"a": ENTRY}) + bytes(4),
    "data left over": header({"a": ENTRY}) + bytes(12),
    "metadata of another type": header({"__metadata__": {"digest": 3}, "a": ENTRY}) + bytes(8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_safetensors(name, folder, tmp_path, vlm):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    (tmp_path / "quant.json").write_bytes((folder / "quant.json").read_bytes())
    refused(load_quantized, vlm, tmp_path)
    refused(load_converted, tmp_path)
    (tmp_path / "tower_set.safetensors").write_bytes(HEADERS[name])
    assert FeatureCache(tmp_path).get("tower", "set", 2) is None
    refused(read_tensor_file, path, "a file", "write it again")
    refused(read_weights, path)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(content=JSON | st.dictionaries(st.text(max_size=3), ANY_ENTRY, max_size=3), data=st.binary(max_size=64))
def test_any_header_is_tensors_or_one_line(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(header(content) + data)
    try:
        tensors, metadata = read_tensor_file(path, "a file", "write it again")
        assert isinstance(tensors, dict) and isinstance(metadata, dict)
    except VLMQError as error:
        assert "\n" not in str(error)


class NoNetwork(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("hf-hub:evil/model", "none"),
        ("hf-hub:evil/model@main", "x"),
        ("hf-hub:", "none"),
        ("local-dir:/nowhere", "none"),
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32", "openai"),
        ("ViT-B-16-SigLIP", "webli"),
        ("http://evil/model", "none"),
        ("vit_clean", "http://evil/weights.safetensors"),
        ("vit_clean", "hf-hub:evil/model"),
        ("../../../x", "none"),
    ],
)
def test_names_in_files_start_no_download(folder, content, name, pretrained, tmp_path, monkeypatch):
    asked = []

    def no_network(*args, **kwargs):
        asked.append(args)
        raise NoNetwork(str(args))

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    origin = {**content["origin"], "name": name, "pretrained": pretrained}
    origin["provenance"] = {**origin["provenance"], "source": pretrained}
    bad = {**content, "origin": origin}
    bad.pop("digest")
    fake, low = tmp_path / "fake", tmp_path / "low"
    for path in (fake, low):
        path.mkdir()
        (path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (fake / "quant.json").write_text(json.dumps(sealed(bad)))
    refused(main, ["convert", f"--checkpoint={fake}", f"--out={tmp_path / 'out'}"])
    plain = {"activations": "keep", "kernels": "own", "float8": False}
    (low / "convert.json").write_text(
        json.dumps({"format": 2, "conversion": plain, "tensors": "0", "quantized": sealed(bad)})
    )
    refused(load_converted, low)
    assert not asked
    if name.startswith("hf-hub:evil"):  # typed, it is asked for
        refused(main, ["convert", f"--checkpoint={fake}", f"--out={tmp_path / 'out'}", f"--model={name}"])
        assert asked
    refused(main, ["convert", f"--checkpoint={fake}", f"--out={tmp_path / 'out'}", "--model=another"])
