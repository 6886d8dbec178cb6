"""A grid cut into parts for several machines, the same cut everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.study.run.grid import Run


def shard_of(runs: Sequence[Run], shard: str | None) -> list[Run]:
    """The runs of one shard, in the grid's order.

    Runs that differ in their scope alone stay together, for their vision towers share features; these groups are dealt out in turn.
    As a method has every VLM in a row, a number of shards that has a divisor in common with that of VLMs would give a shard the same VLMs
    again and again: wherever the deal would repeat itself, the next shard begins. So after each whole row the VLMs of a shard, and
    one VLM's runs in all shards, differ by one in number at most. The shards of a grid are disjoint and together the whole of it,
    and every beginning of all of them a beginning of the grid.

    Args:
        runs: the grid.
        shard: ``"2/8"``, the second of eight; ``None`` for all.

    Raises:
        VLMQError: it is no such thing.
    """
    if shard is None:
        return list(runs)
    found = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise VLMQError(f"study.shard '{shard}' is not of the form 2/8 (the second of eight shards)")
    number, of = int(found[1]), int(found[2])
    repeats_after = math.lcm(len({run.vlm for run in runs}) or 1, of)
    groups: dict[tuple[int, str, str, str], int] = {}
    chosen = []
    for run in runs:
        place = groups.setdefault((run.seed, run.vlm, run.method, run.bits), len(groups))
        if (place + place // repeats_after) % of == number - 1:
            chosen.append(run)
    return chosen
