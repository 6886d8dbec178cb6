"""The command line: an experiment (``vlmq fit | validate | test | predict``), or another of :data:`~lightning_vlmq.commands.COMMANDS`."""

from __future__ import annotations

import logging
import re
import sys
import warnings

import jsonargparse
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_vlmq import data, modules  # noqa: F401 - so that class names work without their module
from lightning_vlmq.callbacks import ResultsWriter
from lightning_vlmq.commands import COMMANDS
from lightning_vlmq.core.errors import VLMQError

_EPILOG = """The model's and the data's own options: 'vlmq {0} --model.help EvaluationModule' (or QATModule, PretrainingModule), and
'vlmq {0} --data.help EmbeddedData'. Committed configs to start from: configs/eval.yaml, configs/qat.yaml, configs/pretrain."""


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
                "epilog": f"Further commands, each with a --help of its own: vlmq {', vlmq '.join(COMMANDS)}.",
                "exit_on_error": False,
                **{name: {"exit_on_error": False, "epilog": _EPILOG.format(name)} for name in self.subcommands()},
            },
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that a command line should not offer."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ("fit", "validate", "test", "predict")}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with Lightning's table of results off by default: it repeats what :class:`HeadlinePrinter` prints for every set."""
        if self._has_commands:
            parser.set_defaults({f"{name}.verbose": False for name in ("validate", "test")})
        super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--results.*``, the writer of results that every command has."""
        parser.add_lightning_class_args(ResultsWriter, "results")


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the command line without the program's name; ``None`` takes ``sys.argv``.

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
    args = sys.argv[1:] if args is None else args
    try:
        if args and args[0] in COMMANDS:
            COMMANDS[args[0]](args[1:])
        else:
            VLMQCLI(args=args)
    except (jsonargparse.ArgumentError, ValueError) as error:
        if (own := _own_error(error)) is not None:
            raise own from error
        if isinstance(error, jsonargparse.ArgumentError):
            raise VLMQError(_one_line(str(error))) from error
        raise


def entry_point() -> None:
    """The console script: bad input ends with one line on standard error and exit code 2."""
    try:
        main()
    except VLMQError as error:
        print(f"vlmq: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _own_error(error: BaseException | None) -> VLMQError | None:
    """The package's own error behind one that the parser wrapped around it."""
    while error is not None and not isinstance(error, VLMQError):
        error = error.__cause__ or error.__context__
    return error


_FRAME = re.compile(
    r"^\s*(-\s)?(Parser key \"[^\"]*\":\s*$|Does not validate|Subtypes:|Errors:|Problem with given class_path|Given value)"
)


def _one_line(message: str) -> str:
    """The innermost reason in a parser's message, which nests one explanation a level of the config, and where it applies."""
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    reasons = [line for line in message.splitlines() if line.strip() and not _FRAME.match(line)]
    reason = max(reasons, key=lambda line: len(line) - len(line.lstrip(" -")), default="see vlmq --help").strip(" -")
    reason = re.sub(r'^Parser key "[^"]+": ', "", reason)
    return f"{keys}: {reason}" if keys else reason
