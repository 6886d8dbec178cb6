"""What the spectra cost: processor time of their callbacks as a share of a whole QAT run, at its defaults. Run by hand.

    python benchmarks/callbacks.py                                   # vit_clean, lsq_contrastive, W4A8, minutes
    python benchmarks/callbacks.py --vlm coca_clean --scope vision
    python benchmarks/callbacks.py --argument=--trainer.max_epochs=1

Runs 'vlmq fit --config qat' in this process, into a folder that is deleted, and counts what is spent inside each callback of the config:
its hooks, and what the results writer asks it for. Both are of the same run, so that other work on the machine falls on both alike.
The aim is that the two spectra together take at most 3 % of a run.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lightning import Callback

import lightning_vlmq.callbacks
from lightning_vlmq import cli

WATCHED = ("SingularValueSpectrum", "ActivationSpectrum", "ReliabilityDiagrams", "GridTrajectories", "RunSummary")
AIM = 0.03


class Meter:
    """Processor seconds inside the methods of classes, calls from one to another of a class counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: set[str] = set()

    def watch(self, owner: type) -> None:
        """Count everything that others call of a callback."""
        for name in dir(owner):
            method = getattr(owner, name)
            is_called = name.startswith("on_") or name in ("setup", "curves", "rows")
            if is_called and callable(method) and method is not getattr(Callback, name, None):
                setattr(owner, name, self._counted(owner.__name__, method))

    def _counted(self, owner: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            if owner in self._inside:
                return method(*args, **options)
            self._inside.add(owner)
            start = time.process_time()
            try:
                return method(*args, **options)
            finally:
                self.seconds[owner] += time.process_time() - start
                self._inside.discard(owner)

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="vit_clean")
    parser.add_argument("--method", default="lsq_contrastive")
    parser.add_argument("--scope", default="vision_text")
    parser.add_argument("--argument", action="append", default=[], help="a further argument of vlmq fit")
    args = parser.parse_args()
    meter = Meter()
    for name in WATCHED:
        meter.watch(getattr(lightning_vlmq.callbacks, name))
    words = ["fit", "--config", "qat", "--model.vlm", args.vlm, "--model.quant.method", args.method]
    words += ["--model.quant.scope", args.scope, "--model.quant.weight_bits", "4", "--model.quant.act_bits", "8"]
    with tempfile.TemporaryDirectory() as folder:
        place = [f"--results.root={folder}", f"--trainer.logger.save_dir={folder}"]
        start = time.process_time()
        cli.main([*words, *place, *args.argument])
        whole = time.process_time() - start
    print(f"\n{args.vlm}, {args.method}, W4A8, {args.scope}: {whole:.1f} s of processor time")
    for name in WATCHED:
        print(f"{name:24}{meter.seconds[name]:8.2f} s{meter.seconds[name] / whole:8.1%}")
    share = sum(meter.seconds[name] for name in WATCHED[:2]) / whole
    print(f"spectra: {share:.1%} of the run (aim {AIM:.0%})")


if __name__ == "__main__":
    main()
