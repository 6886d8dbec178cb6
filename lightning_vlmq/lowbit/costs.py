"""What a low-bit model costs beside full precision: milliseconds per call, bytes of files and memory, and on which machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchao
from torch import Tensor
from torch.utils.benchmark import Timer

from lightning_vlmq.core.atomic import scratch
from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.lowbit.convert import flat_state
from lightning_vlmq.lowbit.export import PROGRAMS
from lightning_vlmq.models import VLM
from lightning_vlmq.quant.checkpoint import WEIGHTS, write_tensors
from lightning_vlmq.results.version import code_version

WARM_UP = 3
"""Untimed calls before the first timed one."""


@torch.no_grad()
def latencies(
    full: VLM, converted: VLM, towers: Sequence[str], batch: int, rounds: int, compile: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean milliseconds per call, with its standard error, of each encoder in scope: by encoder, then by model."""
    size, device = full.image_size, full.mean.device
    pixels = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    tokens = full.tokenize(["a photo of a red shoe"] * batch)
    found = {}
    for tower in towers:
        x = (pixels if tower == "vision" else tokens).to(device)
        calls: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, vlm in (("fp32", full), ("converted", converted)):
            calls[name] = vlm.encode_image if tower == "vision" else vlm.encode_text
            if compile:
                calls[f"{name} compiled"] = _compiled(calls[name], x)
        found["image" if tower == "vision" else "text"] = _take_turns(calls, x, rounds)
    return found


def _compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    fast = torch.compile(call)
    try:
        fast(x)
    except Exception as error:  # the compiler raises what it likes
        raise VLMQError(f"torch.compile failed ({first_line(error)}); leave compile out") from error
    return fast


def _take_turns(calls: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Time several functions of ``x`` in turn, so that whatever else the machine does hits all of them."""
    threads = torch.get_num_threads()
    timers = {n: Timer("f(x)", globals={"f": f, "x": x}, num_threads=threads) for n, f in calls.items()}
    for timer in timers.values():
        timer.timeit(WARM_UP)
    times = {n: torch.empty(rounds, dtype=torch.float64) for n in calls}
    for i in range(rounds):
        for n, timer in timers.items():
            times[n][i] = 1000 * timer.timeit(1).mean
    errors = {n: t.std().item() / math.sqrt(rounds) if rounds > 1 else math.nan for n, t in times.items()}
    return {n: {"mean": t.mean().item(), "stderr": errors[n]} for n, t in times.items()}


def sizes(full: VLM, converted: VLM, folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of both models' files and of their tensors in memory, and of the programs."""
    state = full.state_dict()
    with scratch(folder / WEIGHTS) as partial:
        write_tensors(partial, state)
        fp32 = partial.stat().st_size
    programs = {
        program: (folder / program).stat().st_size for program in PROGRAMS.values() if (folder / program).exists()
    }
    return {
        "file": {"fp32": fp32, "converted": (folder / WEIGHTS).stat().st_size},
        "memory": {"fp32": _bytes(state.values()), "converted": _bytes(flat_state(converted)[0].values())},
        "programs": programs,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def setting(vlm: VLM, batch: int, rounds: int) -> dict[str, Any]:
    """Where and how latencies were taken: device, hardware, threads, calls, versions."""
    device = vlm.mean.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": str(device),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "rounds": rounds,
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "code_version": code_version(),
    }
