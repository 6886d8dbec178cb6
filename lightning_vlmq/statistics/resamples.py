"""Bootstrap resamples: which samples are drawn, and the values of a statistic on each draw.

Samples are resampled together: columns of the same *group* share their resampled indices (confidence and correctness of one model; the
same column of two models on the same samples), different groups are resampled independently (ID and OOD sets; common and counter
background). All randomness comes from the seed, and results do not depend on how the work is chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError

_CHUNK_ELEMENTS = 2**21  # resampled values held per column at a time: 16 MiB as float64


def bootstrap_indices(n: int, n_resamples: int, generator: torch.Generator) -> Tensor:
    """Draw ``n_resamples`` resamples of ``n`` samples with replacement (Efron 1979).

    Args:
        n: number of samples, at least 1.
        n_resamples: number of resamples R.
        generator: a CPU generator, advanced by the call; successive calls continue one stream.

    Returns:
        int64 ``[R, n]`` in [0, n), on the CPU.

    Raises:
        VLMQError: ``n`` is 0 or ``n_resamples`` is negative.
    """
    if n < 1 or n_resamples < 0:
        raise VLMQError(f"cannot draw {n_resamples} bootstrap resamples of {n} samples")
    return torch.randint(n, (n_resamples, n), generator=generator)


def seeded_generator(seed: int, stream: int = 0) -> torch.Generator:
    """A CPU generator for a seed (non-negative) and one of its independent streams."""
    # seeds that differ by little give related Mersenne Twister states; SeedSequence spreads them
    state = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(state[0]) << 31) ^ int(state[1]))


def _sizes_by_group(columns: Sequence[Tensor], groups: Sequence[int] | None) -> tuple[Sequence[int], dict[int, int]]:
    groups = [0] * len(columns) if groups is None else list(groups)
    if not columns or len(groups) != len(columns):
        raise VLMQError(f"need one group per column, got {len(columns)} columns and {len(groups)} groups")
    sizes: dict[int, int] = {}
    for column, group in zip(columns, groups):
        if column.ndim != 1 or column.shape[0] == 0:
            raise VLMQError(f"bootstrap columns must be [n] with n > 0, got {tuple(column.shape)}")
        if sizes.setdefault(group, column.shape[0]) != column.shape[0]:
            raise VLMQError(
                f"columns of one group must have the same n, got {sizes[group]} and {column.shape[0]}; "
                "give independent sets different numbers in groups, e.g. groups=(0, 1)"
            )
    return groups, sizes


def bootstrap_replicates(
    fn: Callable[..., Tensor],
    *columns: Tensor,
    n_resamples: int,
    seed: int,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Values of a statistic on bootstrap resamples.

    Args:
        fn: takes the columns with a leading resample dimension, ``[r, n_i]`` each, and returns ``[r]``.
        columns: tensors ``[n_i]``.
        n_resamples: number of resamples R.
        seed: non-negative seed.
        groups: the group of each column; one group if not given. Columns of one group share indices.

    Returns:
        float64 ``[R]`` on the CPU.

    Raises:
        VLMQError: columns are empty or not one-dimensional, sizes differ within a group, or ``fn`` does not keep the
            resample dimension.
    """
    groups, sizes = _sizes_by_group(columns, groups)
    generators = {group: seeded_generator(seed, stream) for stream, group in enumerate(sizes)}
    chunk = max(1, _CHUNK_ELEMENTS // max(sizes.values()))
    values = []
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        index = {group: bootstrap_indices(n, rows, generators[group]) for group, n in sizes.items()}
        value = fn(*(column[index[group].to(column.device)] for column, group in zip(columns, groups)))
        if value.shape != (rows,):
            raise VLMQError(f"the statistic must map columns [r, n] to [r], got {tuple(value.shape)} for r = {rows}")
        values.append(value.to("cpu", torch.float64))
    return torch.cat(values) if values else torch.empty(0, dtype=torch.float64)


def _weights(n: int, n_resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    chunk = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        index = bootstrap_indices(n, rows, generator)
        index += torch.arange(rows).unsqueeze(1) * n
        yield torch.bincount(index.flatten(), minlength=rows * n).view(rows, n)


def bootstrap_means(columns: Tensor, n_resamples: int = 10_000, seed: int = 0) -> Tensor:
    """Means of many columns over the same resamples, as multinomial weights times a matrix.

    Ratios and differences of means (accuracies, relative changes) follow from the returned columns row by row; put them
    through :func:`~lightning_vlmq.statistics.bootstrap.summarise`. The resamples are those of :func:`bootstrap_replicates` with the
    same seed.

    Args:
        columns: ``[n, k]``, any real dtype.
        n_resamples: number of resamples R.
        seed: non-negative seed.

    Returns:
        float64 ``[R, k]`` on the CPU. A column with a NaN is NaN throughout.

    Raises:
        VLMQError: ``columns`` is not two-dimensional or has no rows.
    """
    if columns.ndim != 2 or columns.shape[0] == 0:
        raise VLMQError(f"columns must be [n, k] with n > 0, got {tuple(columns.shape)}")
    values = columns.to("cpu", torch.float64)
    n = values.shape[0]
    broken = values.isnan().any(0)
    means = [weights.to(torch.float64) @ values / n for weights in _weights(n, n_resamples, seeded_generator(seed))]
    result = torch.cat(means) if means else torch.empty(0, values.shape[1], dtype=torch.float64)
    result[:, broken] = torch.nan  # 0 * NaN is NaN already; said, not left to the matrix product
    return result
