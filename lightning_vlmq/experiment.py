"""One experiment, ``vlmq fit | validate | test | predict``: LightningCLI, its help by importance, and what an option lacks a config for."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import pickle
import re
import textwrap
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_vlmq import callbacks, data, modules
from lightning_vlmq.callbacks import ResultsWriter
from lightning_vlmq.callbacks.loggers import forgive
from lightning_vlmq.callbacks.printing import clear_bars
from lightning_vlmq.callbacks.whole import require_place
from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.core.configs import config_folder, config_names, config_summary, find_config
from lightning_vlmq.core.errors import VLMQError, parser_errors
from lightning_vlmq.quant.methods import METHODS

FIRST_CONFIG = {"fit": "qat"}
"""The config that a command starts from, where it is not ``eval``."""

_TRAINER_OPTIONS = (
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "max_epochs",
    "limit_val_batches",
    "enable_progress_bar",
)


class PlainHelp(jsonargparse.DefaultHelpFormatter):
    """Help texts without the markup of the docstrings that they come from."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options."""
        super().start_section(None if heading is None else plain(heading))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return super()._split_lines(plain(text), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(plain(text), width, indent)


def plain(text: str) -> str:
    """A docstring's text without its markup: names of what it refers to, words that were set as code.

    Example:
        >>> plain("see :class:`~lightning_vlmq.quant.QuantScheme`, or ``fp32``")
        "see QuantScheme, or 'fp32'"
    """
    text = re.sub(r":\w+:`~[^`]*?([^`.]+)`", r"\1", text)
    return re.sub(r"``([^`]*)``", r"'\1'", re.sub(r":\w+:`([^`]+)`", r"\1", text))


class WholeCheckpoints(TorchCheckpointIO):
    """Training checkpoints that are there whole or not at all, on disk, with the mode that the umask gives."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a local path; what lies elsewhere is Lightning's. Raises ``OSError`` with the path."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as partial:
            torch.save(checkpoint, partial)


class VLMQCLI(LightningCLI):
    """LightningCLI with a seed by default, no padding of evaluation data under DDP, and a writer of results."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        self._has_commands = run
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            trainer_defaults={"use_distributed_sampler": False},  # the data modules shard, without repeating samples
            parser_kwargs={
                "prog": "vlmq",
                "exit_on_error": False,
                "formatter_class": PlainHelp,
                **{name: {"exit_on_error": False, "formatter_class": PlainHelp} for name in self.subcommands()},
            },
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that a command line should not offer."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only"} for name in ("fit", "validate", "test", "predict")}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints load as data only, whatever Lightning's default for the place that they are in."""
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def _parse_ckpt_path(self) -> None:
        """Refuse checkpoints that are not on this machine, missing, or more than data."""
        subcommand = self.config.get("subcommand")
        path = str((self.config[subcommand].get("ckpt_path") if subcommand else None) or "")
        if "://" in path or path.startswith("registry"):
            raise VLMQError(f"ckpt_path '{path}' is not on this machine; download it, then give the file's path")
        if path and path not in ("best", "last", "hpc") and not Path(path).is_file():
            raise VLMQError(f"ckpt_path '{path}' does not exist; give the path of a checkpoint file")
        try:
            super()._parse_ckpt_path()
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError, KeyError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise VLMQError(
                f"checkpoint '{path}' is damaged or holds more than data ({reason.strip()[:160]}); use one that Lightning saved here"
            ) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with Lightning's table of results off by default.

        It repeats for every set what :class:`~lightning_vlmq.callbacks.HeadlinePrinter` prints.
        """
        if self._has_commands:
            parser.set_defaults({f"{name}.verbose": False for name in ("validate", "test")})
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Find out before any work whether results can be written, where some will be."""
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        parts = ("fast_dev_run", "overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches")
        is_partial = any((config.get("trainer") or {}).get(part) for part in parts)
        if (
            getattr(rank_zero_only, "rank", 0) in (None, 0)
            and command in ("fit", "validate", "test")
            and not is_partial
        ):
            require_place(Path(config["results"]["root"]), "results")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with loggers that end no run, and checkpoints that are whole."""
        trainer = super().instantiate_trainer(**kwargs)
        forgive(trainer)
        clear_bars(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--results.*``, the writer of results that every command has."""
        parser.add_lightning_class_args(ResultsWriter, "results")


def run(name: str, args: list[str]) -> None:
    """Run one experiment.

    Args:
        name: ``fit``, ``validate``, ``test`` or ``predict``.
        args: the command line after it; ``--config`` gives files.

    Raises:
        VLMQError: bad input, said in one line.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers.*"
    )  # images are in memory: workers slow it down
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings(
        "ignore", message=".*in eval mode at the start of training.*"
    )  # towers keep their statistics in QAT
    warnings.filterwarnings(
        "ignore", message=".*intended to run from within Python like.*"
    )  # which is what a study does
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    if "--help" in args or "-h" in args:
        print(short_help(name))
        raise SystemExit(0)
    _require_config(name, args)
    try:
        VLMQCLI(args=[name, *("--help" if word == "--help-all" else word for word in args)])
    except jsonargparse.ArgumentError as error:
        if hint := _config_with_option(str(error), args):
            raise VLMQError(hint) from error
        raise


class _ParsedError(Exception):
    """A command line was parsed, and nothing more is wanted."""


class _Parser(VLMQCLI):
    """The command line's parser alone: nothing is drawn, built or written."""

    def _set_seed(self) -> None:
        """Leave the generators as they are."""

    def before_instantiate_classes(self) -> None:
        """Stop where :func:`run` would begin to build."""
        raise _ParsedError


def check(name: str, args: list[str]) -> None:
    """Refuse a command line that :func:`run` would not take: an option that is not there, a value of another type.

    Args:
        name: as for :func:`run`.
        args: likewise.

    Raises:
        VLMQError: bad input, said in one line.
    """
    with parser_errors(), suppress(_ParsedError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says them
        _Parser(args=[name, *args])


def short_help(name: str) -> str:
    """What ``vlmq <name> --help`` prints: the options by importance, the Trainer's last and few."""
    first = FIRST_CONFIG.get(name, "eval")
    groups = {
        "quant": "methods, one each",
        "data": "published data sets, and your own",
        **({"pretrain": "the embedded models"} if name == "fit" else {}),
    }
    listed = [(first, config_summary(find_config(first)))]
    listed += [
        (f"{group}/…", f"{title}: {', '.join(config.split('/')[1] for config in config_names(group))}")
        for group, title in groups.items()
    ]
    lines = [
        textwrap.fill(what, 100, initial_indent=f"  {config:<12}", subsequent_indent=" " * 14)
        for config, what in listed
    ]
    parser = jsonargparse.ArgumentParser(
        prog=f"vlmq {name}",
        usage=f"vlmq {name} --config {first} [--config NAME]... [options]",
        description="Configs by name or file; later ones add to and replace what earlier ones say:",
        epilog="Any other class of model, data, callback or logger: its class path in a config, or as --model, --data, "
        f"--trainer.callbacks+=. What a class takes: vlmq {name} --model.help CLASS, --data.help CLASS. Everything the Trainer "
        f"takes: vlmq {name} --help-all.",
        formatter_class=PlainHelp,
    )
    parser.add_argument("-c", "--config", metavar="NAME", help="a config's name, or a file; any number of them")
    parser.add_argument("--print_config", action="store_true", help="print what all of it comes to, and end")
    module = modules.QATModule if name == "fit" else modules.EvaluationModule
    parser.add_class_arguments(module, "model", skip={"evaluators"})
    parser.add_class_arguments(data.EmbeddedData, "data")
    parser.add_class_arguments(ResultsWriter, "results")
    parser.add_class_arguments(
        Trainer, "trainer", skip=set(inspect.signature(Trainer).parameters) - {*_TRAINER_OPTIONS}
    )
    head, _, options = parser.format_help().partition("\noptions:")
    methods = ["methods, with their options, for --model.quant.method; set one as in 'smoothquant(alpha=0.8)':"]
    methods += [
        textwrap.fill(call, 100, initial_indent="  ", subsequent_indent=" " * 6, break_long_words=False)
        for call in _method_calls(trained=name == "fit")
    ]
    return "\n".join([head.rstrip(), *lines, "", *methods, "", f"options:{options}"]).rstrip()


def _method_calls(trained: bool) -> list[str]:
    """Every method as a call with its options and their defaults, e.g. ``smoothquant(joint=True, alpha=0.5)``."""
    found = {name: method for name in METHODS if (method := METHODS[name]).needs_training == trained}
    return [
        f"{name}({', '.join(f'{f.name}={getattr(method, f.name)!r}' for f in dataclasses.fields(method))})"
        for name, method in sorted(found.items())
    ]


def _require_config(name: str, args: list[str]) -> None:
    """Refuse a command line whose options belong to nothing, for want of a config or a class."""
    options = [word.partition("=")[0] for word in args if word.startswith("-")]
    if {"--config", "-c", "--model", "--help-all"} & set(options) or any(
        option.endswith(".help") for option in options
    ):
        return
    first = FIRST_CONFIG.get(name, "eval")
    what = f"{options[0]} belongs to a model that no config names" if options else "no config says which model and data"
    raise VLMQError(f"{what}: add --config {first}, as in vlmq {name} --config {first} {' '.join(args)}".rstrip())


def _config_with_option(message: str, args: list[str]) -> str | None:
    """What to add where an option belongs to a class that the configs do not name, but a shipped one does; ``None`` elsewhere."""
    given = [
        match for word in args if (match := re.match(r"--(model|data|trainer\.callbacks)\.(?:init_args\.)?(\w+)", word))
    ]
    for part, option in (match.groups() for match in given):
        if f"Option '{option}' is not accepted" not in message:
            continue
        if part == "trainer.callbacks":
            kinds = [kind for kind in callbacks.__all__ if option in _parameters(getattr(callbacks, kind))]
            fitting = [f"--trainer.callbacks+=lightning_vlmq.callbacks.{kind}" for kind in kinds]
        else:
            names = sorted(config_names(), key=lambda name: ("/" in name, name))
            fitting = [f"--config {name}" for name in names if option in _options(name, part)]
        if fitting:
            shown = " or ".join(fitting[:4]) + (", …" if len(fitting) > 4 else "")
            return f"--{part}.{option} is no option of what is named so far; add what takes it before: {shown}"
    return None


def _options(name: str, part: str) -> set[str]:
    """The options of the class that a shipped config gives for the model or the data."""
    content: Any = yaml.safe_load((config_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    own = content.get(part) if isinstance(content, dict) else None
    path = own.get("class_path") if isinstance(own, dict) else None  # a study's data are names of configs
    if not path:
        return set()
    module, _, kind = path.rpartition(".")
    return _parameters(getattr(importlib.import_module(module), kind))


def _parameters(kind: type) -> set[str]:
    """Names of what a class and those that it derives from take."""
    made = [base.__dict__["__init__"] for base in kind.__mro__ if "__init__" in base.__dict__]
    return {name for init in made for name in inspect.signature(init).parameters} - {"self", "args", "kwargs"}
