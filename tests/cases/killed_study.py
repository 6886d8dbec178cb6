"""A small real study whose runner is killed again and again, at writes, flushes and moves of its files; run as a script.

``python killed_study.py <root> <moment> ...``: a runner (a fork of this process, where everything is imported but nothing computed)
is killed at the first moment, the next one goes on until the second, and after the last one runs to the end. Each prints JSON lines:
at which file it was killed, how it ended, and what the store then held.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path

QUICK = [
    "--data.datasets=[concepts]",
    "--data.n_concepts=8",
    "--data.calibration_pairs=16",
    "--data.train_batch_size=8",
]
QUICK += [
    "--data.batch_size=10",
    "--model.scores=[msp]",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
]
QUICK += ["--model.statistics.n_resamples=50", "--model.statistics.n_resamples_ranking=20"]


def grid(root: Path) -> list:
    """Full precision, post-training quantization with its scale tuned, and a training."""
    from lightning_vlmq.study.run.grid import Run

    runs = []
    for kind, method, words in (
        ("fp32", "fp32", ["validate", "--config=eval", "--model.lst=false"]),
        ("ptq", "minmax", ["validate", "--config=eval", "--model.quant.weight_bits=4"]),
        ("qat", "lsq_contrastive", ["fit", "--config=qat", "--model.lst=false", "--trainer.max_epochs=1"]),
    ):
        arguments = [
            *words,
            f"--model.quant.method={method}",
            *QUICK,
            f"--results.root={root}",
            f"--results.run_id={method}",
        ]
        runs.append(Run("vit_clean", "vision", method, "W4A8", kind, 0, method, tuple(arguments)))
    return runs


def study(root: Path) -> None:
    """What ``vlmq-study`` does with these runs."""
    from rich.console import Console

    from lightning_vlmq import cli
    from lightning_vlmq.results.store import ResultsStore
    from lightning_vlmq.study.analysis.comparison import analyse
    from lightning_vlmq.study.analysis.runs import StudyResults
    from lightning_vlmq.study.report.page import write_report
    from lightning_vlmq.study.run.execute import execute

    with open(os.devnull, "w") as nowhere:
        outcome = execute(grid(root), ResultsStore(root), cli.main, Console(file=nowhere))
    assert not outcome.failures, outcome.failures
    write_report(analyse(StudyResults.load(root)))


def die_at(moment: str) -> None:
    """Kill this process at a moment ``<part of a path>:<n>``: its n-th creation, flush or move of a file there; of even n right after."""
    where, _, number = moment.rpartition(":")
    counter, screen = itertools.count(1), os.dup(1)  # a run's output goes elsewhere

    def watch(owner, name, path_of):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            path = str(path_of(args)).replace("/.", "/")
            hit = where in path and next(counter) == int(number)
            if hit and int(number) % 2:
                kill(name, path)
            result = real(*args, **kwargs)
            if hit:
                kill(name, path)
            return result

        setattr(owner, name, watched)

    def kill(name, path):
        os.write(screen, f"{json.dumps({'killed': name, 'at': path})}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    watch(os, "fsync", lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))
    watch(os, "replace", lambda args: args[1])
    watch(Path, "touch", lambda args: args[0])


def contents(root: Path) -> dict:
    """By run that counts: a hash of its rows and samples, without what differs in every repetition."""
    from lightning_vlmq.results.store import ResultsStore

    store = ResultsStore(root)
    found = {}
    for run_id in store.sound()[0]:
        frames = store.rows([run_id]), store.samples(run_id), store.curves(run_id)
        found[run_id] = hashlib.sha256("".join(frame.to_csv() for frame in frames).encode()).hexdigest()
    return found


def forked(call) -> int:
    """Run something in a fork; its exit status, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path, moments: list[str]) -> None:
    """Kill at each moment in turn, then finish."""
    import torch

    import lightning_vlmq.api
    import lightning_vlmq.experiment
    import lightning_vlmq.study.run.study  # noqa: F401 - imported once, not in every fork

    torch.set_num_threads(1)
    for moment in [*moments, "nowhere:1"]:
        code = forked(lambda moment=moment: (die_at(moment), study(root)))
        forked(lambda code=code: print(json.dumps({"code": code, "runs": contents(root)}), flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
