"""Which code a result comes from."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import lightning_vlmq


@functools.cache
def code_version() -> str:
    """The package's version, with the commit where the package runs from a git checkout.

    Returns:
        ``"0.1.0"`` when installed, ``"0.1.0+g1a2b3c4"`` in a checkout, ``"0.1.0+g1a2b3c4.dirty"`` with changed files.
    """
    version = lightning_vlmq.__version__
    checkout = Path(lightning_vlmq.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return version
    # `--exclude *` ignores tags: the version already says the release, the hash says the commit.
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return version
    commit = described.stdout.strip().replace("-", ".")
    return f"{version}+g{commit}" if described.returncode == 0 and commit else version
