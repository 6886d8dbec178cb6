"""Which rows a process sees in which order, and one crew of loader processes for all evaluation sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

if TYPE_CHECKING:
    from lightning_vlmq.data.sets import Batch, ImageSet

Place = tuple[int, int]
"""A set and a row of it."""


class Share(SequentialSampler):
    """A process's share of the rows, in order: every ``processes``-th. No row is seen twice, and a share may be empty.

    Args:
        data: whose rows.
        process: which process, from 0.
        processes: how many there are.
    """

    def __init__(self, data: Sized, process: int = 0, processes: int = 1) -> None:
        super().__init__(data)
        self.rows = range(process, len(data), processes)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


class TrainOrder(DistributedSampler[Any]):
    """A process's share of an epoch's order, which is a matter of the seed and the epoch's number alone.

    Every process has as many rows: those that do not go round are left out of the epoch, never repeated.

    Args:
        data: what is drawn from.
        processes: how many processes there are.
        process: which one this is.
        seed: of the order.

    Attributes:
        start: number of rows of this process that the epoch goes on after.
    """

    def __init__(self, data: Dataset[Any], processes: int, process: int, seed: int) -> None:
        super().__init__(data, processes, process, seed=seed, drop_last=True)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.start :])


class TrainLoader(DataLoader[Any]):
    """Batches in a :class:`TrainOrder`; an epoch that a checkpoint was taken in goes on after the batches that were trained on.

    Iterating begins with the first batch, not before: the sampler is told the epoch's number only after Lightning has made the
    iterator, and a loader's processes would fetch another epoch's rows by then.

    Args:
        args: as ``DataLoader``.
        done: number of batches of the epoch that were trained on, asked for at its first batch.
        kwargs: as ``DataLoader``; its ``sampler`` a :class:`TrainOrder`.
    """

    def __init__(self, *args: Any, done: Callable[[], int] = int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.done = done

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if isinstance(self.sampler, TrainOrder):  # overfit_batches puts another in its place
            assert self.batch_size is not None
            self.sampler.start = self.done() * self.batch_size
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: how far an epoch is, the trainer keeps. That there is a state tells Lightning that the loader goes on from there."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gives."""


def with_rows(batch: Any) -> Any:
    """A batch with ``index`` once more, as NumPy ``rows``, which stay on the CPU: what is looked up by them need not wait for a GPU."""
    return {**batch, "rows": batch["index"].numpy().copy()}  # a tensor's memory moves on its way between processes


class _AllSets(Dataset[Any]):
    """All sets as one, a row of which is a :data:`Place`; a batch is of one set."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.sets = list(sets)

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def __getitems__(self, places: list[Place]) -> Batch:
        which = places[0][0]
        return self.sets[which].__getitems__([row for _, row in places])


class _Turn(Sampler[list[Place]]):
    """The batches of the set whose turn it is."""

    def __init__(self, batches: Sequence[BatchSampler]) -> None:
        self.batches = batches
        self.which = 0

    def __iter__(self) -> Iterator[list[Place]]:
        which = self.which
        for rows in self.batches[which]:
            yield [(which, row) for row in rows]

    def __len__(self) -> int:
        return len(self.batches[self.which])


class SetLoader:
    """The batches of one evaluation set, decoded by loader processes that it shares with the other sets.

    Processes of its own for each of a hundred sets would all stay until the end, or be started a hundred times. One set is
    iterated at a time; another's turn ends it.

    Attributes:
        dataset: the set's images.
    """

    def __init__(self, dataset: ImageSet, which: int, turn: _Turn, crew: DataLoader[Batch]) -> None:
        self.dataset = dataset
        self._which, self._turn, self._crew = which, turn, crew

    def __len__(self) -> int:
        return len(self._turn.batches[self._which])

    def __iter__(self) -> Iterator[Batch]:
        self._turn.which = self._which
        yield from self._crew

    @property
    def _iterator(self) -> Any:
        """Where a ``DataLoader`` holds its processes; Lightning ends them by it when a run is over."""
        return self._crew._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._crew._iterator = value


def set_loaders(
    sets: Sequence[ImageSet], samplers: Sequence[Sampler[int]], batch_size: int, num_workers: int, pin_memory: bool
) -> list[SetLoader]:
    """One loader per set, all with the same ``num_workers`` (at least 1) processes, which stay from set to set and from epoch to epoch.

    Args:
        sets: the images.
        samplers: which rows of each are seen, in which order.
        batch_size: images per batch.
        num_workers: number of processes.
        pin_memory: whether batches lie in memory that a GPU copies from by itself.
    """
    turn = _Turn([BatchSampler(sampler, batch_size, drop_last=False) for sampler in samplers])
    crew: DataLoader[Batch] = DataLoader(
        _AllSets(sets),
        batch_sampler=turn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=True,
        collate_fn=with_rows,
    )
    return [SetLoader(s, k, turn, crew) for k, s in enumerate(sets)]
