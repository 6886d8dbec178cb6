"""Per-sample columns collected over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_vlmq.core.errors import VLMQError

RECORD_COLUMNS: Mapping[str, torch.dtype] = {
    "target": torch.int64,
    "prediction": torch.int64,
    "confidence": torch.float32,
    "correct": torch.bool,
    "correct_top5": torch.bool,
    "nll": torch.float32,
    "brier": torch.float32,
    "kl": torch.float32,
    "mcm": torch.float32,
    "energy": torch.float32,
}
"""The columns every evaluated data set records, beside ``index``."""


class SampleRecords(Metric):
    """The per-sample records of one data set, gathered over all processes and sorted by sample index.

    torchmetrics gathers an empty list state as an empty tensor of the metric's float dtype. Under DDP, a process
    without any batch then disagrees with the others on the dtype of an integer or bool column, and the gathered values
    are garbage or the collective hangs. Here an empty column is gathered in its declared dtype.

    Args:
        columns: dtype by name (a Python identifier) of the columns beside ``index``.
        kwargs: torchmetrics' own arguments.

    Example:
        >>> records = SampleRecords({"correct": torch.bool})
        >>> records.update(index=torch.tensor([1, 0]), correct=torch.tensor([True, False]))
        >>> records.compute()
        {'index': tensor([0, 1]), 'correct': tensor([False,  True])}
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    def __init__(self, columns: Mapping[str, torch.dtype] = RECORD_COLUMNS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dtype_of = {"index": torch.int64, **columns}
        for name in self._dtype_of:
            self.add_state(self._state(name), default=[], dist_reduce_fx="cat")

    @staticmethod
    def _state(name: str) -> str:
        return f"column_{name}"

    def update(self, index: Tensor, **columns: Tensor) -> None:
        """Add a batch: ``index`` and every declared column, each cast to its declared dtype.

        Args:
            index: int64 ``[n]``, the position of each sample in its data set.
            columns: every declared column, each ``[n]``.

        Raises:
            VLMQError: a column is missing, unknown, not one-dimensional, or of another length.
        """
        columns = {"index": index, **columns}
        if columns.keys() != self._dtype_of.keys():
            raise VLMQError(
                f"the records take the columns {sorted(self._dtype_of)}, got {sorted(columns)}; declare them at construction"
            )
        shapes = {name: tuple(values.shape) for name, values in columns.items()}
        if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise VLMQError(f"all columns must be [n] with the same n, got {shapes}")
        for name, values in columns.items():
            getattr(self, self._state(name)).append(values.detach().to(self._dtype_of[name]))

    def _column(self, name: str) -> Tensor:
        """All rows of one column so far, ``[n]`` of the declared dtype (all processes' rows inside ``compute``)."""
        state = getattr(self, self._state(name))
        if isinstance(state, list) and not state:
            return torch.empty(0, dtype=self._dtype_of[name], device=self.device)
        return dim_zero_cat(state)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        for name in self._dtype_of:
            if isinstance(getattr(self, self._state(name)), list):
                setattr(self, self._state(name), [self._column(name)])
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """All columns ``[n]``, sorted by ``index``; empty tensors of the declared dtypes if nothing was recorded.

        Raises:
            VLMQError: a sample was recorded more than once, which biases every statistic.
        """
        index, order = self._column("index").sort()
        repeated = index[1:][index[1:] == index[:-1]]
        if repeated.numel():
            raise VLMQError(
                f"{repeated.numel()} samples were recorded twice (the first has index {int(repeated[0])}): the sampler "
                "padded the data set to share it evenly; set the trainer's use_distributed_sampler: false and shard "
                "without padding, and reset the records between data sets"
            )
        return {name: self._column(name)[order] for name in self._dtype_of}

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """As torchmetrics', but a single sample's columns stay ``[1]``, where torchmetrics makes scalars of them."""
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def columns(*args: Any, **kwargs: Any) -> Any:
            return {name: column.reshape(-1) for name, column in wrapped(*args, **kwargs).items()}

        return columns
