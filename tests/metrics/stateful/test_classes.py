"""The two metrics that validation records with: any split over batches and processes gives the same."""

from functools import partial

import pytest
import torch
from cases.metric_tester import SPLITS, Case, N, assert_equal, check_metric, run_two_processes

from lightning_vlmq import metrics as m

C = 7


def make_cases():
    generator = torch.Generator().manual_seed(7)
    logits, target = 2 * torch.randn(N, C, generator=generator), torch.randint(C, (N,), generator=generator)
    target[::5] = -1  # without a class
    index = torch.randperm(N, generator=generator)
    probs, group = logits.double().softmax(-1), index % 3
    records = {"target": target, "confidence": probs.amax(-1).float(), "correct": probs.argmax(-1) == target}
    order, dtypes = index.argsort(), {name: column.dtype for name, column in records.items()}
    gap, square, own = (torch.zeros(*shape, C, 9, dtype=torch.float64) for shape in ((3,), (), ()))
    for i in range(N):
        for k in range(C if target[i] >= 0 else 0):
            p = probs[i, k].float()
            cell, difference = int(p * 8), float(target[i] == k) - float(p)
            gap[group[i], k, cell] += difference
            square[k, cell] += difference**2
            own[k, cell] += float(p * (1 - p))
    filled = torch.zeros(C, 9)
    for k in range(C):
        filled[k] = torch.bincount((probs[target >= 0, k] * 8).long(), minlength=9)
    sums = {"gap": gap, "count": torch.bincount(group[target >= 0], minlength=3).double()}
    sums |= {"variance": square + own / filled.clamp(min=1), "square": square}
    return [
        Case("records", partial(m.SampleRecords, dtypes), {"index": index, **records},
             {"index": torch.arange(N), **{name: column[order] for name, column in records.items()}}),
        Case("classwise_gaps", partial(m.ClasswiseGaps, num_classes=C, n_bins=8, n_groups=3),
             {"index": index, "logits": logits, "target": target}, sums),
    ]  # fmt: skip


CASES = make_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_splits_and_life_cycle(case):
    check_metric(case)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_two_processes(CASES, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_agree_with_one(two_processes, case, split):
    for results in two_processes:
        assert_equal(results[case.name, split], case.expected, case.atol)
