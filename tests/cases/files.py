"""Small trees in the layout of published data sets, written by the tests that read them."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images import Preprocess
from lightning_vlmq.data.readers import Reading

SHARED = Path(os.environ.get("VLMQ_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
"""Where larger data for tests may lie; a test that needs it is skipped where it does not."""


def shared_file(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not in {SHARED}; set VLMQ_TEST_DATA to the folder that has it")
    return path


def random_pixels(rng, height=20, width=30):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_image(path, rng, height=20, width=30):
    """A random image of the kind that the suffix says; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    path.write_bytes(encode(random_pixels(rng, height, width), kind))
    return path


def write_tree(root, rng, files):
    return [write_image(root / file, rng) for file in files]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_cifar(folder, rng, n, fine_names=None):
    """torchvision's test batch of CIFAR-10, or of CIFAR-100 where names are given. Returns pixels, labels and the files' hashes."""
    import hashlib

    base = folder / ("cifar-10-batches-py" if fine_names is None else "cifar-100-python")
    base.mkdir(parents=True)
    pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10 if fine_names is None else len(fine_names), n).tolist()
    rows = pixels.transpose(0, 3, 1, 2).reshape(n, -1)
    key, test, meta = (
        ("labels", "test_batch", ("batches.meta", {"label_names": ["x"] * 10}))
        if fine_names is None
        else ("fine_labels", "test", ("meta", {"fine_label_names": fine_names}))
    )
    (base / test).write_bytes(pickle.dumps({"data": rows, key: labels}))
    (base / meta[0]).write_bytes(pickle.dumps(meta[1]))
    md5 = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in (test, meta[0])}
    return pixels, labels, md5


def write_tar(path, members):
    """A tar file of names and bytes, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def reading(root, size=16, **kwargs):
    return Reading(root, Preprocess(size), **kwargs)


def refused(step, *words):
    """The message of the one-line error that a step ends with, which holds the words."""
    with pytest.raises(VLMQError) as caught:
        step()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert str(word) in message, message
    return message


def names_and_targets(s):
    """File names (without their folders) and targets of an evaluation set of files."""
    rows = s.images.rows.tolist()
    return [Path(s.images.source.name(row)).name for row in rows], s.images.columns["target"].tolist()
