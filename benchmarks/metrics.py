"""Time and memory of what validation does, to record and then to compute, beside torchmetrics' and scikit-learn's way. Run by hand.

    python benchmarks/metrics.py                                  # 1,000,000 samples x 1,000 classes
    python benchmarks/metrics.py --samples 20000 --classes 100    # seconds

Every cell runs in its own process. Time is processor time of all threads for updates and the final value, without
making the data, so that a busy machine does not tell.
Memory is the process' peak above what it held with the data of one batch in place and everything imported. Logits come in
batches, as from a model: what has to be kept between batches is the contender's own affair. A contender that cannot work
on a stream (scikit-learn, numpy) keeps what it needs; for NLL and Brier score that is all probabilities, which scikit-learn
also clips for the NLL: its value is a little lower. torchmetrics has no NLL: its mean of torch's cross entropies. A contender
that needs more than --limit GiB is stopped and said to have failed. Ratios are contender / ours, the first line of a
metric: above 1 means that ours is faster or smaller. More threads wait actively for each other and make processor time a poor measure.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from cells import CellError, run_cell
from torch import Tensor

Batches = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]
_POOL = 4


class Stream:
    """Batches of (logits [b, C], target [b], score [b], is_id [b]); a few blocks of noise, rescaled for each batch."""

    def __init__(self, samples: int, classes: int, batch: int) -> None:
        self.samples, self.batch = samples, batch
        self.seconds = 0.0  # spent making data, to be left out
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(_POOL, batch, classes, generator=generator)
        self.generator = generator

    def __iter__(self) -> Batches:
        for start in range(0, self.samples, self.batch):
            began = time.process_time()
            size = min(self.batch, self.samples - start)
            scale = 2 + torch.rand(size, 1, generator=self.generator)
            logits = self.pool[(start // self.batch) % _POOL, :size] * scale
            other = torch.randint(logits.shape[1], (size,), generator=self.generator)
            right = torch.rand(size, generator=self.generator) < 0.6
            target = torch.where(right, logits.argmax(-1), other)
            is_id = torch.rand(size, generator=self.generator) < 0.5
            score = torch.randn(size, generator=self.generator) + is_id
            self.seconds += time.process_time() - began
            yield logits, target, score, is_id


def _recorded(column: str, fn: Callable[..., Tensor] = torch.mean) -> Callable[[Stream], float]:
    """As validation: per-sample columns of every batch in ``SampleRecords``, then a function of them."""

    def run(stream: Stream) -> float:
        from lightning_vlmq import metrics as m

        names = ("confidence", "correct") if column == "confidence" else (column,)
        records, start = m.SampleRecords({name: m.RECORD_COLUMNS[name] for name in names}), 0
        for logits, target, _, _ in stream:
            records.update(torch.arange(start, start + len(target)), **m.per_sample(logits, target, names))
            start += len(target)
        columns = records.compute()
        return float(fn(*(columns[name] for name in names)))

    return run


def _classwise(classes: int) -> Callable[[Stream], float]:
    def run(stream: Stream) -> float:
        from lightning_vlmq import metrics as m

        gaps, start = m.ClasswiseGaps(classes), 0
        for logits, target, _, _ in stream:
            gaps.update(torch.arange(start, start + len(target)), logits, target)
            start += len(target)
        sums = gaps.compute()
        return float(sums["gap"].sum(0).abs().sum(-1).mean() / sums["count"].sum())

    return run


def _on_logits(metric: Callable[[], object]) -> Callable[[Stream], float]:
    def run(stream: Stream) -> float:
        m = metric()
        for logits, target, _, _ in stream:
            m.update(logits, target)
        return float(m.compute())

    return run


def _on_scores(metric: Callable[[], object]) -> Callable[[Stream], float]:
    def run(stream: Stream) -> float:
        m = metric()
        for _, _, score, is_id in stream:
            m.update(score, is_id)
        return float(m.compute())

    return run


def _held_scores(fn: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Stream], float]:
    def run(stream: Stream) -> float:
        held = [(is_id.numpy(), score.numpy()) for _, _, score, is_id in stream]
        return float(fn(*(np.concatenate(part) for part in zip(*held))))

    return run


def _held_confidences(strategy: str) -> Callable[[Stream], float]:
    """scikit-learn has reliability curves but no calibration error: the curve's gaps weighted by its bins' sizes."""

    def run(stream: Stream) -> float:
        from sklearn.calibration import calibration_curve

        held = []
        for logits, target, _, _ in stream:
            confidence, prediction = logits.softmax(-1).max(-1)
            held.append((confidence.double().numpy(), (prediction == target).numpy()))
        confidence, correct = (np.concatenate(part) for part in zip(*held))
        accuracy, mean = calibration_curve(correct, confidence, n_bins=15, strategy=strategy)
        uniform = np.linspace(0, 1, 16)
        edges = uniform if strategy == "uniform" else np.quantile(confidence, uniform)
        count = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=15)
        return float((np.abs(accuracy - mean) * count[count > 0]).sum() / len(confidence))

    return run


def _held_aurc(stream: Stream) -> float:
    held = []
    for logits, target, _, _ in stream:
        confidence, prediction = logits.softmax(-1).max(-1)
        held.append((confidence.numpy(), (prediction != target).numpy()))
    confidence, wrong = (np.concatenate(part) for part in zip(*held))
    ordered = wrong[np.argsort(-confidence, kind="stable")]
    return float((ordered.cumsum() / np.arange(1, len(ordered) + 1)).mean())


def _held_probabilities(fn: Callable[..., float]) -> Callable[[Stream], float]:
    def run(stream: Stream) -> float:
        held = [(logits.softmax(-1).numpy(), target.numpy()) for logits, target, _, _ in stream]
        probs, target = (np.concatenate(part) for part in zip(*held))
        return float(fn(target, probs, labels=np.arange(probs.shape[1])))

    return run


def _held_score_columns(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Stream], float]:
    def run(stream: Stream) -> float:
        held = [(score, is_id) for _, _, score, is_id in stream]
        score, is_id = (torch.cat(part) for part in zip(*held))
        return float(fn(score[is_id], score[~is_id]))

    return run


def contenders(classes: int) -> dict[str, dict[str, Callable[[Stream], float]]]:
    from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score, roc_curve
    from torchmetrics import MeanMetric
    from torchmetrics import classification as tm

    from lightning_vlmq import metrics as m

    def sklearn_fpr95(is_id: np.ndarray, score: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(is_id, score, drop_intermediate=False)
        return fpr[np.argmax(tpr >= 0.95)]

    class TorchmetricsFPR95(tm.BinaryROC):
        def compute(self) -> Tensor:
            fpr, tpr, _ = super().compute()
            return fpr[(tpr >= 0.95).int().argmax()]

    class ProbabilityECE(tm.MulticlassCalibrationError):
        def update(self, logits: Tensor, target: Tensor) -> None:
            super().update(logits.softmax(-1), target)

    class MeanCrossEntropy(MeanMetric):
        def update(self, logits: Tensor, target: Tensor) -> None:
            super().update(torch.nn.functional.cross_entropy(logits, target, reduction="none"))

    return {
        "ece": {
            "ours": _recorded("confidence", m.calibration_error),
            "torchmetrics": _on_logits(lambda: ProbabilityECE(num_classes=classes, validate_args=False)),
            "scikit-learn": _held_confidences("uniform"),
        },
        "adaptive_ece": {
            "ours": _recorded("confidence", partial(m.calibration_error, binning="mass")),
            "scikit-learn": _held_confidences("quantile"),
        },
        "nll": {
            "ours": _recorded("nll"),
            "torchmetrics": _on_logits(MeanCrossEntropy),
            "scikit-learn": _held_probabilities(log_loss),
        },
        "brier": {
            "ours": _recorded("brier"),
            "scikit-learn": _held_probabilities(partial(brier_score_loss, scale_by_half=False)),
        },
        "classwise_ece": {"ours": _classwise(classes)},
        "aurc": {
            "ours": _recorded("confidence", m.aurc),
            "numpy": _held_aurc,
        },
        "auroc": {
            "ours": _held_score_columns(m.auroc),
            "torchmetrics": _on_scores(lambda: tm.BinaryAUROC(validate_args=False)),
            "scikit-learn": _held_scores(roc_auc_score),
        },
        "aupr_in": {
            "ours": _held_score_columns(m.aupr_in),
            "torchmetrics": _on_scores(lambda: tm.BinaryAveragePrecision(validate_args=False)),
            "scikit-learn": _held_scores(average_precision_score),
        },
        "fpr95": {
            "ours": _held_score_columns(m.fpr95),
            "torchmetrics": _on_scores(lambda: TorchmetricsFPR95(validate_args=False)),
            "scikit-learn": _held_scores(sklearn_fpr95),
        },
    }


def measure(metric: str, contender: str, args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    resource.setrlimit(resource.RLIMIT_AS, (args.limit << 30, args.limit << 30))
    run = contenders(args.classes)[metric][contender]
    run(Stream(10 * args.batch, args.classes, args.batch))  # imports, first-call costs, and the peak of a few batches
    stream = Stream(args.samples, args.classes, args.batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    value = run(stream)
    seconds = time.process_time() - began - stream.seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"value": value, "seconds": seconds, "mib": (peak - before) / 1024}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--batch", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=20, help="GiB of address space that a contender may take")
    parser.add_argument("--metrics", nargs="*", help="only these metrics")
    parser.add_argument("--cell", nargs=2, metavar=("METRIC", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.cell:
        print(json.dumps(measure(*args.cell, args)))
        return
    print(f"{args.samples:,} samples x {args.classes:,} classes, batches of {args.batch:,}, {args.threads} threads")
    print(f"{'metric':14}{'contender':15}{'value':>12}{'CPU s':>10}{'peak MiB':>10}{'x time':>9}{'x memory':>10}")
    names = ("samples", "classes", "batch", "threads", "limit")
    for metric, cells in contenders(args.classes).items():
        if args.metrics and metric not in args.metrics:
            continue
        ours: dict[str, float] = {}
        for contender in cells:
            try:
                result = run_cell(__file__, (metric, contender), args, names)
            except CellError as error:
                print(f"{metric:14}{contender:15} failed: {error}")
                continue
            ours = ours or result
            ratio_time, ratio_memory = result["seconds"] / ours["seconds"], result["mib"] / max(ours["mib"], 0.1)
            print(
                f"{metric:14}{contender:15}{result['value']:12.6f}{result['seconds']:10.2f}{result['mib']:10.1f}"
                f"{ratio_time:9.2f}{ratio_memory:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
