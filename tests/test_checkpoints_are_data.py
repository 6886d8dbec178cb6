"""No checkpoint that is given to a command runs code, wherever it lies."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from lightning_vlmq.cli import main
from lightning_vlmq.core.errors import VLMQError


class Marker:
    """Writes a file when it is unpickled as code."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def evil(tmp_path):
    torch.save({"state_dict": {}, "x": Marker(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with open(tmp_path / "plain.ckpt", "wb") as file:
        pickle.dump(Marker(tmp_path / "ran"), file)
    yield tmp_path
    assert not (tmp_path / "ran").exists()


def command(name, *args):
    config = "qat" if name == "fit" else "eval"
    return [
        name,
        "--config",
        config,
        "--data.datasets=[concepts]",
        "--data.n_concepts=8",
        "--trainer.logger=false",
        *args,
    ]


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("file", ["evil.ckpt", "plain.ckpt"])
def test_a_local_checkpoint_is_read_as_data(name, file, evil):
    with pytest.raises(VLMQError, match="holds more than data") as error:
        main(command(name, f"--results.root={evil / 'logs'}", f"--ckpt_path={evil / file}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
def test_a_remote_checkpoint_is_refused_and_not_fetched(name, evil):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(evil)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/evil.ckpt"
        with pytest.raises(VLMQError, match="not on this machine"):
            main(command(name, f"--results.root={evil / 'logs'}", f"--ckpt_path={url}"))
    finally:
        server.shutdown()
    assert not asked


@pytest.mark.parametrize("option", ["--model.pretrained={}", "--model.checkpoint={}"])
@pytest.mark.parametrize("file", ["evil.ckpt", "plain.ckpt"])
def test_weights_and_quantized_models_are_read_as_data(option, file, evil):
    with pytest.raises(VLMQError):
        main(command("validate", f"--results.root={evil / 'logs'}", option.format(evil / file)))


def test_running_code_cannot_be_asked_for(tmp_path):
    with pytest.raises(VLMQError, match="weights_only"):
        main(command("validate", f"--results.root={tmp_path}", "--weights_only=false"))
