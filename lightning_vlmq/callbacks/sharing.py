"""Work that the processes of a group share: each does a part, and all have the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import distributed as dist

from lightning_vlmq.core.errors import VLMQError

T = TypeVar("T")


def dealt_out(sizes: Mapping[str, int], make: Callable[[Sequence[str]], Mapping[str, T]]) -> dict[str, T]:
    """What is made for every name, each process of the default group making its share of it; alone, one makes all.

    Every process has to call it with the same names, and gets all that is made.

    Args:
        sizes: how large each name's work is; large ones are dealt out first, so that shares cost about the same.
        make: makes some of them, by name, of what can be pickled and lies on the CPU.

    Returns:
        By name, in the order of ``sizes``.

    Raises:
        VLMQError: in every process, what it was in the one that it happened to.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return dict(make(list(sizes)))
    order = sorted(sizes, key=lambda name: -sizes[name])
    parts: list[Any] = [None] * dist.get_world_size()
    try:
        found: Any = make(order[dist.get_rank() :: dist.get_world_size()])
    except VLMQError as error:
        found = str(error)  # raised once all have it: the others would wait for ever
    dist.all_gather_object(parts, found)
    if errors := [part for part in parts if isinstance(part, str)]:
        raise VLMQError(errors[0])
    merged = {name: one for part in parts for name, one in part.items()}
    return {name: merged[name] for name in sizes}
