"""One measurement in a process of its own, so that none finds what another left behind."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

# glibc otherwise serves batches from the heap after a while; small tensors kept between batches then split the gaps
# that freed batches leave, and the heap grows by a batch each time: gigabytes that no contender asked for
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


class CellError(Exception):
    """The process failed; the message is the last line of what it said."""


def run_cell(
    script: str,
    cell: Sequence[str],
    args: argparse.Namespace,
    names: Sequence[str],
    flags: Sequence[str] = (),
    **environment: str,
) -> dict[str, float]:
    """Run ``script --cell <cell>`` with the named arguments of this process, and parse the JSON object that it prints last.

    Raises:
        CellError: it ended with an error.
    """
    command = [sys.executable, *flags, script, "--cell", *cell]
    for name in names:
        value = getattr(args, name.replace("-", "_"))
        command += [] if value is None else [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT, **environment})
    if done.returncode:
        raise CellError((done.stderr.strip().splitlines() or [f"ended with {done.returncode} (out of memory?)"])[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
