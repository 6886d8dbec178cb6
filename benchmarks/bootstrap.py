"""Intervals of every change against full precision beside scipy's and scikit-learn's way on the same data. Run by hand.

    python benchmarks/bootstrap.py                                       # 10,000 resamples of 10,000 samples
    python benchmarks/bootstrap.py --samples 2000 --resamples 1000

means    The paired bootstrap of all metrics of a run that are means over samples, on full precision and a quantized model:
         top-1, top-5, NLL, Brier, agreement, flips of both kinds, and the ECE by its bins' gaps. Ours draws the resamples once for
         all columns; scipy's `bootstrap` (paired, percentile) draws them for each metric. A plain loop over resamples does
         one metric on a hundredth of the resamples; its seconds are those times a hundred.
auroc    DeLong's standard error of the difference of two AUROCs: ours by ranks (Sun & Xu 2014), the definition's sums over
         all pairs, and the bootstrap with scikit-learn's `roc_auc_score`, again a hundredth of the resamples.

Seconds are by the clock, medians of --repeat runs in turns; run it on an idle machine. Standard errors are shown so that one sees
that all contenders compute the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from lightning_vlmq.evaluation.estimates import calibration_gaps
from lightning_vlmq.metrics import per_sample
from lightning_vlmq.statistics import bootstrap_means, delong, summarise

Array = NDArray[np.float64]
PART = 100  # the slow contenders do a PART-th of the resamples


def run_columns(samples: int, seed: int) -> tuple[list[str], Array, Array]:
    """Names and columns ``[n, k]`` of two models' per-sample metrics, and their gaps by calibration bin ``[n, 2 * 16]``."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(10, (samples,), generator=generator)
    logits_f = 3 * torch.randn(samples, 10, generator=generator)
    logits_f[torch.arange(samples), target] += 4
    logits_q = 0.9 * logits_f + 0.8 * torch.randn(samples, 10, generator=generator)
    full, quantized = per_sample(logits_f, target), per_sample(logits_q, target)
    names = ["correct", "correct_top5", "nll", "brier"]
    columns = [own[name].double() for name in names for own in (full, quantized)]
    broken, repaired = full["correct"] & ~quantized["correct"], ~full["correct"] & quantized["correct"]
    columns += [(full["prediction"] == quantized["prediction"]).double(), broken.double(), repaired.double()]
    confidence, correct = (torch.stack([full[c], quantized[c]], 1).double().numpy() for c in ("confidence", "correct"))
    gaps = calibration_gaps(confidence, correct).reshape(samples, -1)
    return [*names, "agreement", "broken", "repaired"], torch.stack(columns, 1).numpy(), gaps


def ours_means(columns: Array, gaps: Array, resamples: int) -> float:
    """All metrics' intervals; the standard error of the top-1 difference."""
    drawn = bootstrap_means(torch.from_numpy(np.concatenate([columns, gaps], 1)), resamples)
    means = columns.mean(0)
    found = [summarise(means[k + 1] - means[k], drawn[:, k + 1] - drawn[:, k]) for k in range(0, 8, 2)]
    found += [summarise(means[k], drawn[:, k]) for k in range(8, columns.shape[1])]
    ece = drawn[:, columns.shape[1] :].unflatten(1, (2, -1)).abs().sum(-1)
    point = np.abs(gaps.mean(0).reshape(2, -1)).sum(-1)
    found.append(summarise(point[1] - point[0], ece[:, 1] - ece[:, 0]))
    return found[0].stderr


def scipy_means(columns: Array, gaps: Array, resamples: int) -> float:
    def of(data: tuple[Array, ...], statistic: Callable[..., Array]) -> float:
        result = stats.bootstrap(
            data, statistic, paired=True, vectorized=True, n_resamples=resamples, method="percentile", batch=100, rng=0
        )
        return float(result.standard_error)

    def difference(a: Array, b: Array, axis: int) -> Array:
        return b.mean(axis) - a.mean(axis)

    found = [of((columns[:, k], columns[:, k + 1]), difference) for k in range(0, 8, 2)]
    for k in range(8, columns.shape[1]):
        of((columns[:, k],), np.mean)

    def ece_difference(*bins: Array, axis: int) -> Array:
        error = [sum(np.abs(part.mean(axis)) for part in half) for half in (bins[:16], bins[16:])]
        return np.asarray(error[1] - error[0])

    of(tuple(gaps.T), ece_difference)
    return found[0]


def loop_means(columns: Array, gaps: Array, resamples: int) -> float:
    rng, n = np.random.default_rng(0), len(columns)
    values = []
    for _ in range(resamples // PART):
        rows = rng.integers(n, size=n)
        values.append(columns[rows, 1].mean() - columns[rows, 0].mean())
    return float(np.std(values, ddof=1))


def pairs_auroc(ids: Array, oods: Array, resamples: int) -> float:
    """DeLong, DeLong & Clarke-Pearson 1988, as written: the kernel of every pair, averaged over rows and columns."""
    v10, v01 = [], []
    for k in range(2):
        kernel = (ids[:, k, None] > oods[None, :, k]) + 0.5 * (ids[:, k, None] == oods[None, :, k])
        v10.append(kernel.mean(1))
        v01.append(kernel.mean(0))
    return float(np.sqrt(sum(np.var(v[1] - v[0], ddof=1) / len(v[0]) for v in (v10, v01))))


def sklearn_auroc(ids: Array, oods: Array, resamples: int) -> float:
    rng = np.random.default_rng(0)
    label = np.repeat([1, 0], [len(ids), len(oods)])
    values = []
    for _ in range(resamples // PART):
        own = np.concatenate(
            [ids[rng.integers(len(ids), size=len(ids))], oods[rng.integers(len(oods), size=len(oods))]]
        )
        values.append(roc_auc_score(label, own[:, 1]) - roc_auc_score(label, own[:, 0]))
    return float(np.std(values, ddof=1))


def ours_auroc(ids: Array, oods: Array, resamples: int) -> float:
    sides = [torch.from_numpy(side[:, k].copy()) for k in range(2) for side in (ids, oods)]
    return delong(*sides).stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names, columns, gaps = run_columns(args.samples, 0)
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2 * args.samples, 1)) + 0.5 * rng.normal(size=(2 * args.samples, 2))
    ids, oods = shared[: args.samples] + 1, shared[args.samples :]
    print(f"{args.resamples:,} resamples of {args.samples:,} samples, {args.threads} threads, medians of {args.repeat}")
    print(f"{'what':8}{'contender':24}{'seconds':>10}{'x ours':>10}{'standard error':>16}")
    contenders: dict[str, dict[str, tuple[Callable[[], float], int]]] = {
        "means": {
            f"ours, {len(names) + 1} metrics": (lambda: ours_means(columns, gaps, args.resamples), 1),
            f"scipy, {len(names) + 1} metrics": (lambda: scipy_means(columns, gaps, args.resamples), 1),
            "loop, 1 metric": (lambda: loop_means(columns, gaps, args.resamples), PART),
        },
        "auroc": {
            "ours": (lambda: ours_auroc(ids, oods, args.resamples), 1),
            "all pairs": (lambda: pairs_auroc(ids, oods, args.resamples), 1),
            "scikit-learn, bootstrap": (lambda: sklearn_auroc(ids, oods, args.resamples), PART),
        },
    }
    for what, cells in contenders.items():
        seconds: dict[str, list[float]] = {name: [] for name in cells}
        errors: dict[str, float] = {}
        for _ in range(args.repeat):
            for name, (run, factor) in cells.items():
                began = time.perf_counter()
                errors[name] = run()
                seconds[name].append(factor * (time.perf_counter() - began))
        own = statistics.median(next(iter(seconds.values())))
        for name, found in seconds.items():
            middle = statistics.median(found)
            print(f"{what:8}{name:24}{middle:10.3f}{middle / own:10.1f}{errors[name]:16.6f}", flush=True)


if __name__ == "__main__":
    main()
