import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import RECORD_COLUMNS, SampleRecords, per_sample


def test_sorted_and_typed():
    records = SampleRecords()
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, -1])
    columns = {"target": target, **per_sample(logits, target)} | {n: torch.rand(5) for n in ("kl", "mcm", "energy")}
    records.update(index=torch.tensor([4, 0, 3, 1, 2]), **columns)
    rows = records.compute()
    assert rows["index"].tolist() == [0, 1, 2, 3, 4]
    assert rows["target"].tolist() == [1, 1, -1, 2, 0]
    assert {name: rows[name].dtype for name in RECORD_COLUMNS} == RECORD_COLUMNS
    torch.testing.assert_close(rows["energy"], columns["energy"][torch.tensor([1, 3, 4, 2, 0])])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_recorded_gives_empty_typed_columns():
    rows = SampleRecords({"correct": torch.bool}).compute()
    assert rows["index"].shape == (0,) and rows["index"].dtype == torch.int64
    assert rows["correct"].shape == (0,) and rows["correct"].dtype == torch.bool


def test_a_single_sample_stays_a_column():
    records = SampleRecords({"nll": torch.float32})
    records.update(index=torch.tensor([3]), nll=torch.ones(1))
    assert {name: column.shape for name, column in records.compute().items()} == {"index": (1,), "nll": (1,)}


def test_repeated_sample_names_the_fix():
    records = SampleRecords({"nll": torch.float32})
    records.update(index=torch.tensor([2, 5]), nll=torch.zeros(2))
    records.update(index=torch.tensor([5]), nll=torch.zeros(1))
    with pytest.raises(VLMQError, match=r"index 5.*use_distributed_sampler: false"):
        records.compute()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "take the columns"),
        ({"nll": torch.zeros(2), "brier": torch.zeros(2)}, "take the columns"),
        ({"nll": torch.zeros(3)}, "same n"),
        ({"nll": torch.zeros(2, 1)}, "same n"),
    ],
)
def test_wrong_columns(columns, message):
    with pytest.raises(VLMQError, match=message):
        SampleRecords({"nll": torch.float32}).update(index=torch.arange(2), **columns)


def test_large_indices_survive_exactly():
    """float32, which an empty process' default state would impose, cannot hold this index."""
    records = SampleRecords({"nll": torch.float32})
    records.update(index=torch.tensor([2**24 + 1]), nll=torch.zeros(1))
    assert records.compute()["index"].item() == 2**24 + 1
