"""One tester for every stateful metric: reference value, batch-split invariance, life cycle, two processes.

A case holds whole columns; the tester cuts them into batches. All cases run under DDP in one pair of processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

# batch sizes per process, out of N = 60 samples; a process without any batch, and batches of one and of no sample
N = 60
SPLITS: dict[str, list[list[int]]] = {
    "even": [[15, 15], [15, 15]],
    "uneven": [[1, 30, 0], [29]],
    "rank_1_empty": [[40, 20], []],
    "rank_0_empty": [[], [60]],
}


@dataclass(frozen=True)
class Case:
    """A metric, columns of N samples to feed it by keyword, and the value to expect of them."""

    name: str
    build: Callable[[], Metric]
    columns: dict[str, Tensor]
    expected: Any
    atol: float = 1e-6


def batches(columns: dict[str, Tensor], sizes: list[int], start: int = 0) -> list[dict[str, Tensor]]:
    cut = []
    for size in sizes:
        cut.append({name: values[start : start + size] for name, values in columns.items()})
        start += size
    return cut


def assert_equal(actual: Any, expected: Any, atol: float, exact_dtype: bool = False) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert actual[name].dtype == expected[name].dtype, name
            assert_equal(actual[name], expected[name], atol, exact_dtype=True)
        return
    expected = torch.as_tensor(expected)
    if not exact_dtype:
        actual, expected = actual.double(), expected.double()
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, equal_nan=True)


def check_metric(case: Case) -> None:
    whole = case.build()
    whole.update(**case.columns)
    assert_equal(whole.compute(), case.expected, case.atol)

    for sizes in ([20, 20, 20], [1, 0, 59], [60]):
        metric = case.build()
        for batch in batches(case.columns, sizes):
            metric.update(**batch)
        assert_equal(metric.compute(), whole.compute(), 1e-12)

    clone = pickle.loads(pickle.dumps(whole))
    assert_equal(clone.compute(), case.expected, case.atol)
    first, second = case.build(), case.build()
    a, b = batches(case.columns, [25, 35])
    first.update(**a)
    second.update(**b)
    second.merge_state(first)
    assert_equal(second.compute(), case.expected, case.atol)

    metric = case.build()
    metric.update(**a)
    metric.reset()
    for batch in batches(case.columns, [25, 35]):
        metric(**batch)  # forward: accumulates and returns the batch's own value
    assert_equal(metric.compute(), case.expected, case.atol)


def _run_rank(rank: int, cases: list[Case], directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    results: dict[tuple[str, str], Any] = {}
    for case in cases:
        for split, per_rank in SPLITS.items():
            metric = case.build()
            for batch in batches(case.columns, per_rank[rank], start=sum(per_rank[0]) if rank else 0):
                metric.update(**batch)
            first = metric.compute()
            metric._computed = None  # compute again from the state that unsync restored
            assert_equal(metric.compute(), first, 0.0)
            results[case.name, split] = first
    torch.save(results, Path(directory) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_two_processes(cases: list[Case], directory: Path) -> list[dict[tuple[str, str], Any]]:
    """Every case under every split in two gloo processes: what each of them computed."""
    torch.multiprocessing.spawn(_run_rank, args=(cases, str(directory)), nprocs=2, join=True)
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]
