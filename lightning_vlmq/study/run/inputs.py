"""What a study's runs read and record, found out without running one: their data, and the settings that their configs leave as they are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from lightning_vlmq.core.configs import read_config
from lightning_vlmq.core.errors import VLMQError, of_the_parser, own_error
from lightning_vlmq.core.identity import digest
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.embedded import EmbeddedData
from lightning_vlmq.data.filedata import FileData
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.spectral import PUBLISHED_BANDS


def data_of(arguments: Sequence[str]) -> ReliabilityDataModule:
    """The data module of a run, not set up.

    Args:
        arguments: what ``vlmq`` is called with.

    Raises:
        VLMQError: the data's config is wrong.
    """
    from lightning_vlmq.commands.data import parser

    words: list[str] = []
    for position, word in enumerate(arguments):
        if word == "--config":
            words += [word, arguments[position + 1]]
        elif word.startswith("--data"):
            words.append(word)
    made = parser()
    try:
        found: ReliabilityDataModule = made.instantiate(made.parse_args(words)).data
    except (jsonargparse.ArgumentError, ValueError) as error:
        if not isinstance(error, jsonargparse.ArgumentError) and own_error(error) is None:
            raise
        raise VLMQError(f"the study's data cannot be set up: {of_the_parser(error)}") from error
    return found


def sets_of(data: ReliabilityDataModule, writes: bool = True) -> list[EvalSet]:
    """A data module's evaluation sets. Those in files are listed, and nothing is decoded; embedded ones are made.

    Args:
        data: not set up yet.
        writes: whether embedded ones are kept where the data module says so.
    """
    if isinstance(data, FileData):
        data.take([s for reader in data.readers for s in reader.read(data.reading)])
    else:
        if isinstance(data, EmbeddedData) and not writes:
            data.decoded = None
        data.setup("validate")
    return list(data.eval_sets)


def data_digest(arguments: Sequence[str]) -> str:
    """What the data in files are, wherever they lie: a hash of the listings (relative paths, sizes, times of change) and of the classes.

    Args:
        arguments: of any run of the study.

    Raises:
        VLMQError: data are missing or damaged.
    """
    data = data_of(arguments)
    sets = sets_of(data)
    pairs = data.read_pairs().digest() if isinstance(data, FileData) and data.pair_reader is not None else None
    return digest({"sets": sets, "pairs": pairs}, 16)


def setting(arguments: Sequence[str], section: str, name: str, default: Any) -> Any:
    """What a run's command line, or else its configs, say of an argument; the default where none does.

    Args:
        arguments: what ``vlmq`` is called with.
        section: ``"model"``, ``"data"`` or ``"trainer"``.
        name: the argument, e.g. ``"scores"``.
        default: for where nothing is said.
    """
    value = default
    for position, word in enumerate(arguments):
        if word == "--config":
            content = yaml.safe_load(read_config(Path(arguments[position + 1]))) or {}
            own = content.get(section) or {}
            own = own if isinstance(own, dict) else {}
            value = {**own, **(own.get("init_args") or {})}.get(name, value)
        elif word.startswith(f"--{section}.{name}="):
            value = yaml.safe_load(word.partition("=")[2])
    return value


def n_surgeries(arguments: Sequence[str]) -> int:
    """How many models an :class:`~lightning_vlmq.callbacks.ErrorSurgery` makes of a quantized one, each filed and judged like it."""
    made: set[str] = set()
    found = setting(arguments, "trainer", "callbacks", None) or []
    for callback in found if isinstance(found, list) else [found]:
        about: dict[str, Any] = callback if isinstance(callback, dict) else {"class_path": str(callback)}
        if str(about.get("class_path")).rpartition(".")[2] == "ErrorSurgery":
            bands = (about.get("init_args") or {}).get("bands") or PUBLISHED_BANDS
            made |= {
                "coherent",
                "incoherent",
                *(f"{kind} {tuple(band)}" for kind in ("heal", "hurt") for band in bands),
            }
    return len(made)


def model_setting(arguments: Sequence[str], name: str) -> Any:
    """The same of an argument of the module that evaluates, by default as its signature has it."""
    from lightning_vlmq.modules import EvaluationModule

    return setting(arguments, "model", name, inspect.signature(EvaluationModule).parameters[name].default)
