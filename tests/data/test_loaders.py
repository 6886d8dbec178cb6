"""Shares and orders of rows, and the loader processes that all evaluation sets share."""

import os

import pytest
import torch
from torch.utils.data import Dataset

from lightning_vlmq.data.loaders import Share, TrainOrder, set_loaders


class Told(Dataset):
    """Rows of a set, and who fetched them."""

    def __init__(self, name, n):
        self.name, self.n = name, n

    def __len__(self):
        return self.n

    def __getitems__(self, rows):
        return {"index": torch.tensor(rows), "set": self.name, "process": os.getpid()}


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_shares_are_disjoint_and_all_of_it(n, processes):
    shares = [list(Share(range(n), k, processes)) for k in range(processes)]
    assert sorted(row for share in shares for row in share) == list(range(n))
    assert [len(Share(range(n), k, processes)) for k in range(processes)] == list(map(len, shares))


@pytest.mark.parametrize(("processes", "n"), [(2, 47), (3, 47), (3, 48), (4, 50)])
def test_several_processes_batches_are_those_of_one(processes, n):
    """Batch by batch; torch's own sampler repeats rows to fill up, and makes a batch more of 47."""
    size = 24 // processes
    for epoch in (0, 3):
        orders = [TrainOrder(range(n), processes, k, seed=5) for k in range(processes)]
        alone = TrainOrder(range(n), 1, 0, seed=5)
        for order in (*orders, alone):
            order.set_epoch(epoch)
        rows, shares = list(alone), [list(order) for order in orders]
        assert sorted(rows) == list(range(n)) and len(set(map(len, shares))) == 1
        assert len(shares[0]) // size == n // 24
        for k in range(n // 24):
            together = [row for share in shares for row in share[k * size :][:size]]
            assert sorted(together) == sorted(rows[24 * k :][:24])


def test_an_epoch_goes_on_where_it_was():
    order = TrainOrder(range(20), 2, 1, seed=0)
    whole = list(order)
    order.start = 4
    assert list(order) == whole[4:] and len(order) == 10


def test_sets_share_their_processes_and_keep_them():
    sets = [Told("a", 7), Told("b", 1), Told("c", 10)]
    loaders = set_loaders(sets, [Share(s) for s in sets], 3, num_workers=2, pin_memory=False)
    assert list(map(len, loaders)) == [3, 1, 4]
    seen = set()
    for _ in range(2):
        for s, loader in zip(sets, loaders):
            batches = list(loader)
            assert {batch["set"] for batch in batches} == {s.name} and len(batches) == len(loader)
            assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(s.n))
            assert all((batch["rows"] == batch["index"].numpy()).all() for batch in batches)
            seen |= {batch["process"] for batch in batches}
    assert len(seen) == 2 and os.getpid() not in seen


def test_a_set_that_is_left_early_leaves_nothing_to_the_next():
    sets = [Told("a", 40), Told("b", 4)]
    first, second = set_loaders(sets, [Share(s) for s in sets], 2, num_workers=2, pin_memory=False)
    assert next(iter(first))["set"] == "a"
    assert [batch["index"].tolist() for batch in second] == [[0, 1], [2, 3]]
    assert next(iter(first))["index"].tolist() == [0, 1]
