"""What a study's runs read and record, found out without running one: their data, and the settings that their configs leave as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lightning_vlmq.core.configs import find_config, read_config, with_config_files
from lightning_vlmq.core.errors import parser_errors
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

    words = [
        f"{option}={value}"
        for option, value in _options(arguments)
        if option == "--config" or option.partition(".")[0].rstrip("+") == "--data"
    ]
    made = parser()
    with parser_errors("the study's data cannot be set up: "):
        found: ReliabilityDataModule = made.instantiate(made.parse_args(with_config_files(words))).data
    return found


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options with their values, whether an option and its value are one word or two."""
    for position, word in enumerate(arguments):
        option, joined, value = word.partition("=")
        if option.startswith("--") and joined:
            yield option, value
        elif option.startswith("--") and position + 1 < len(arguments):
            yield option, arguments[position + 1]


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
    """What the data in files are, wherever they lie: a hash of the listings (relative paths, sizes, times of change), classes and prompts.

    Args:
        arguments: of any run of the study.

    Returns:
        The hash; empty for data that are in no files, which the arguments and the package's code tell.

    Raises:
        VLMQError: data are missing or damaged.
    """
    data = data_of(arguments)
    if not isinstance(data, FileData):
        return ""
    sets_of(data)
    pairs = data.read_pairs().digest() if data.pair_reader is not None else None
    return digest({**data.identity(), "pairs": pairs}, 16)


def setting(arguments: Sequence[str], section: str, name: str, default: Any) -> Any:
    """What a run's command line, or else its configs, say of an argument; the default where none does.

    Args:
        arguments: what ``vlmq`` is called with.
        section: ``"model"``, ``"data"`` or ``"trainer"``.
        name: the argument, e.g. ``"scores"``.
        default: for where nothing is said.
    """
    value = default
    for option, given in _options(arguments):
        if option == "--config":
            written = given if given.lstrip().startswith("{") else read_config(find_config(given))
            content = yaml.safe_load(written) or {}
            own = content.get(section) or {}
            own = own if isinstance(own, dict) else {}
            value = {**own, **(own.get("init_args") or {})}.get(name, value)
        elif option == f"--{section}.{name}":
            value = yaml.safe_load(given)
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
