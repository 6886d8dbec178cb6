"""Write docs/first-hour.md: run its commands in an empty folder, and put down what they print.

The commands are those that the document has; only what they print is made anew. Run it in an environment that holds the package:
    python scripts/make_first_hour.py docs/first-hour.md
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LINES = 45
"""A longer answer is cut after so many lines."""


def answer(command: str, folder: str) -> str:
    """What a command prints in a terminal of 100 columns."""
    environment = {**os.environ, "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"( {command} ) 2>&1"], cwd=folder, env=environment, capture_output=True, text=True
    )
    lines = [line.rstrip() for line in done.stdout.splitlines() if "Seed set to" not in line]
    return "\n".join(lines[:LINES] + ["…"] * (len(lines) > LINES)).strip("\n")


def rewritten(document: str, folder: str) -> str:
    """The document with its answers made anew, in order, all in one folder."""

    def block(found: re.Match[str]) -> str:
        command = re.match(r"\$ (?:.*\\\n)*.*", found[1])
        assert command is not None, found[1]
        said = answer(command[0].removeprefix("$ ").replace("\\\n", " "), folder)
        return f"```console\n{command[0]}\n{said}\n```" if said else f"```console\n{command[0]}\n```"

    return re.sub(r"```console\n(\$ .*?)\n```", block, document, flags=re.DOTALL)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("document", type=Path)
    path = parser.parse_args().document
    with tempfile.TemporaryDirectory() as folder:
        path.write_text(rewritten(path.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
    main()
