"""``vlmq data check``: are the data sets of a config there, complete and readable?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_vlmq.commands import command
from lightning_vlmq.core.configs import with_config_files
from lightning_vlmq.core.errors import VLMQError, unknown

if TYPE_CHECKING:
    import jsonargparse


@command("data", "Data and models")
def run(args: list[str]) -> None:
    """Check (data check) that the data sets of a config are there, complete and readable.

    Args:
        args: the command line after ``vlmq data``.

    Raises:
        VLMQError: something is missing, incomplete or unreadable; or an unknown action.
    """
    if args[:1] not in (["check"], ["--help"], ["-h"]):
        raise unknown("action of vlmq data", args[0] if args else "", ["check"])
    from rich.console import Console

    from lightning_vlmq.data.check import check, table

    made = parser()
    given = made.parse_args(with_config_files(args[1:] if args[0] == "check" else args))
    findings = check(made.instantiate(given).data, given.sample, given.full)
    Console().print(table(findings))
    bad = [finding for finding in findings if finding.problem]
    if bad:
        raise VLMQError(f"{len(bad)} of {len(findings)} checks failed; {bad[0].name}: {bad[0].problem}")


def parser() -> jsonargparse.ArgumentParser:
    """The parser of ``vlmq data check``."""
    import jsonargparse

    from lightning_vlmq.data import ReliabilityDataModule

    result = jsonargparse.ArgumentParser(
        prog="vlmq data check", description="Say what of the data sets is there and readable.", exit_on_error=False
    )
    result.add_argument("-c", "--config", action=jsonargparse.ActionConfigFile, help="config files, as for validate")
    result.add_subclass_arguments(ReliabilityDataModule, "data", required=True)
    result.add_argument(
        "--sample", type=jsonargparse.typing.NonNegativeInt, default=16, help="images of each set to decode"
    )
    result.add_argument("--full", action="store_true", help="decode every image")
    for other in ("model", "trainer", "results", "seed_everything"):  # an experiment's config says more than this needs
        result.add_argument(f"--{other}", type=Any, help=jsonargparse.SUPPRESS)
    return result
