"""``vlmq doctor``: what is installed, what is there, what is missing and how to get it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import lightning_vlmq
from lightning_vlmq.commands import WordParser, command
from lightning_vlmq.core.configs import config_folder, config_names
from lightning_vlmq.core.errors import VLMQError

_OPTIONAL = {
    "transformers": "models that open_clip does not have, and the tokenizers of SigLIP (pip install transformers)",
    "wandb": "the W&B logger (pip install wandb)",
    "mlflow": "the MLflow logger (pip install mlflow)",
    "hydra-submitit-launcher": "studies on a Slurm cluster (pip install hydra-submitit-launcher)",
}
"""Packages that are only needed for something, and for what."""


class Check(NamedTuple):
    """One line of the answer: what was looked at, what was found, and what to do where that is not enough."""

    what: str
    found: str
    todo: str = ""


@command("doctor", "Look around")
def run(args: list[str]) -> None:
    """Say what is installed and present, what is missing, and how to get it."""
    WordParser(prog="vlmq doctor", description=run.__doc__).parse_args(args)
    checks = [*packages(), *machine(), *files()]
    width = max(len(check.what) for check in checks)
    for check in checks:
        print(
            f"{'!' if check.todo else ' '} {check.what:<{width}}  {check.found}"
            + (f": {check.todo}" if check.todo else "")
        )
    if missing := [check for check in checks if check.todo]:
        raise VLMQError(f"{len(missing)} of {len(checks)} checks failed; first {missing[0].what}: {missing[0].todo}")
    print("all is there")


def packages() -> Iterator[Check]:
    """The package's requirements beside what is installed; optional ones are named, and never missing."""
    from packaging.requirements import Requirement

    yield Check(
        "lightning_vlmq",
        f"{lightning_vlmq.__version__}, Python {sys.version.split()[0]}, {Path(lightning_vlmq.__file__).parent}",
    )
    try:
        wanted = [Requirement(text) for text in metadata.requires("lightning_vlmq") or []]
    except metadata.PackageNotFoundError:
        yield Check(
            "requirements", "unknown", "the package runs from its folder without being installed; pip install -e ."
        )
        return
    for requirement in (r for r in wanted if r.marker is None):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, "missing", f"pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check(requirement.name, version, "" if fits else f"pip install '{requirement}'")
    for name, use in _OPTIONAL.items():
        try:
            yield Check(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, f"not installed; only for {use}")


def machine() -> Iterator[Check]:
    """Devices, cores, and whether this folder can be written to."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Check(f"GPU {number}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    else:
        yield Check("GPU", "none that torch can use; the embedded models and data need none")
    yield Check("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch")
    writable = os.access(Path.cwd(), os.W_OK)
    todo = "" if writable else "change to a folder you may write to, or give --results.root"
    yield Check(
        "this folder", f"{Path.cwd()}, results go to logs/" if writable else f"{Path.cwd()} cannot be written to", todo
    )


def files() -> Iterator[Check]:
    """Embedded models and data, configs, and where downloaded weights are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from lightning_vlmq.data import EmbeddedData
    from lightning_vlmq.models import zoo

    yield Check("configs", f"{len(config_names())} in {config_folder()}")
    there = zoo.names()
    absent = [name for name in there if not (zoo.FOLDER / f"{name}.safetensors").is_file()]
    todo = "install the package again" + (f"; without weights: {', '.join(absent)}" if absent else "")
    yield Check("embedded models", f"{len(there) - len(absent)} of {len(there)}", todo if absent or not there else "")
    try:
        data = EmbeddedData()
        data.setup()
        yield Check("embedded data", f"{len(data.eval_sets)} evaluation sets, {len(data.pairs or ())} caption pairs")
    except (VLMQError, OSError) as error:
        yield Check("embedded data", "damaged", f"install the package again ({error})")
    cache = Path(HF_HUB_CACHE)
    kept = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    yield Check(
        "downloaded weights", f"{', '.join(kept) or 'none'} in {cache}; fetched where --model.pretrained names some"
    )
