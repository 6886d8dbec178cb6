"""What low-bit models gain when they run: images per second and memory of image encoders, beside FP32 in one run, and the limit. By hand.

    python benchmarks/inference.py --device cuda                                  # batches of 1 to 256, compiled too
    python benchmarks/inference.py --models ViT-B-16 --batches 1 8 --no-compiled  # a CPU

Random weights: speed does not depend on them. A form and FP32 encode the same images in turns; the ratio is the median over
neighbouring calls. On a CPU, seconds are processor time of one thread; on a GPU, time between two synchronisations.

fp32, bf16        weights and activations in that format.
int8 static       W8A8, one calibrated range per layer input; torchao's integer products, own layers for convolutions.
int8 dynamic      W8A8, one range per token (or per image of a convolution), found while running.
int4 weights      packed in memory, full-precision activations.
float8            linear layers, where the device multiplies it.

memory   of the parameters, and the most that a call took beside them.
limit    images per second if all products ran at the peak that was measured here of one large product in the form's number format, or
         if the weights were read once a batch at the speed of a copy, whichever is slower; `of limit` is the share reached.
         FP32's peak is the limit of int4 weights, which are multiplied in full precision.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.lowbit.convert import Conversion, convert_layers, flat_state, require_float8
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.quant import QuantScheme, quantize

MODELS = {"ViT-B-16": "ViT-B-16", "ViT-L-14": "ViT-L-14", "ConvNeXt-B": "convnext_base_w"}
W8A8, W4 = QuantScheme(8, 8), QuantScheme(4, 16)


@dataclass(frozen=True)
class Form:
    """How a model is run: quantized by which scheme, converted how, and the number format that its products are limited by."""

    products: str
    scheme: QuantScheme | None = None
    conversion: Conversion | None = None


FORMS = {
    "fp32": Form("fp32"),
    "bf16": Form("bf16"),
    "int8 static": Form("int8", W8A8, Conversion("static")),
    "int8 dynamic": Form("int8", W8A8, Conversion("dynamic")),
    "int4 weights": Form("fp32", W4, Conversion("none", "own")),
    "float8": Form("float8", W8A8, Conversion("dynamic", float8=True)),
}


def made(vlm: VLM, form: Form, images: Tensor) -> VLM:
    """A copy of the model in a form."""
    own = copy.deepcopy(vlm)
    if form.products == "bf16":
        return own.bfloat16()
    if form.scheme is not None and form.conversion is not None:
        batches = [{"image": images}]
        quantize(own, "minmax", form.scheme, batches)
        convert_layers(own, form.conversion, form.scheme, batches)
    return own


def parameter_bytes(vlm: VLM) -> int:
    """Bytes that the image tower holds in memory."""
    tensors, _ = flat_state(vlm)
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if vlm.tower_of(name) == "vision")


class Clock:
    """Seconds and memory of calls on one kind of device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.process_time()
            call()
            return time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that a call took at most, beyond what was held before."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        ctypes.CDLL(None).malloc_trim(
            0
        )  # else the call takes what earlier ones gave back to the heap, which counts already
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peaks(device: torch.device, clock: Clock) -> dict[str, float]:
    """Measured here: operations per second of a large product by number format, and bytes per second of a copy (read and written)."""
    n = 8192 if clock.on_gpu else 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    small, other = (x.clamp(-3, 3).mul(40).to(torch.int8) for x in (a, b))
    half, halved = a.bfloat16(), b.bfloat16()
    products: dict[str, Callable[[], object]] = {
        "fp32": lambda: a @ b,
        "bf16": lambda: half @ halved,
        "int8": lambda: torch._int_mm(small, other.T),
    }
    try:
        require_float8(device)
        one = torch.ones((), device=device)
        e4m3, column = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        products["float8"] = lambda: torch._scaled_mm(e4m3, column, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except VLMQError:
        pass
    found = {name: 2 * n**3 / best(clock, product) for name, product in products.items()}
    source = torch.ones(2**28 if clock.on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    return {**found, "copy": 2 * source.nbytes / best(clock, lambda: target.copy_(source))}


def best(clock: Clock, call: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    call()
    return min(clock.seconds(call) for _ in range(times))


def compare(
    full: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor], x: Tensor, clock: Clock, repeat: int
) -> tuple[float, float]:
    """Median seconds of ``own``, and the median of how many times as fast as ``full`` it is."""
    full(x), own(x)
    pairs = [(clock.seconds(lambda: full(x)), clock.seconds(lambda: own(x))) for _ in range(repeat)]
    return statistics.median(own for _, own in pairs), statistics.median(full / own for full, own in pairs)


@torch.no_grad()
def measure(label: str, args: argparse.Namespace, device: torch.device, clock: Clock, peak: dict[str, float]) -> None:
    """Print the lines of one model."""
    vlm = load_vlm(MODELS[label], "none").requires_grad_(False).to(device)
    size = vlm.image_size
    images = torch.randint(0, 256, (max(args.batches), 3, size, size), dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        vlm.encode_image(images[:1])
    operations = counter.get_total_flops()
    full: dict[bool, Callable[[Tensor], Tensor]] = {False: vlm.encode_image}
    if args.compiled:
        full[True] = torch.compile(vlm.encode_image)
    print(f"\n{label}: {operations / 1e9:.1f} GFLOP per image at {size} pixels")
    print(
        f"{'form':14}{'':10}{'batch':>6}{'images/s':>10}{'x FP32':>8}{'limit':>9}{'of limit':>10}{'params MB':>11}{'call MB':>9}"
    )
    for name in args.forms:
        form = FORMS[name]
        if form.products not in peak:
            print(f"{name:14}not on this device")
            continue
        own = made(vlm, form, images[:2])
        held = parameter_bytes(own)
        for compiled in full:
            encode = own.encode_image if not compiled else torch.compile(own.encode_image)
            for batch in args.batches:
                x = images[:batch]
                seconds, ratio = compare(full[compiled], encode, x, clock, args.repeat)
                least = max(operations * batch / peak[form.products], 2 * held / peak["copy"])
                taken = clock.peak(lambda: encode(x))  # noqa: B023 - called at once
                print(
                    f"{name:14}{'compiled' if compiled else '':10}{batch:6}{batch / seconds:10.2f}{ratio:8.2f}{batch / least:9.2f}"
                    f"{least / seconds:10.0%}{held / 1e6:11.1f}{taken / 1e6:9.1f}",
                    flush=True,
                )
        del own
        gc.collect()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--batches", type=int, nargs="+", help="1 to 256 on a GPU, 1 and 8 on a CPU, if not given")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    clock = Clock(device)
    args.batches = args.batches or ([1, 4, 16, 64, 256] if clock.on_gpu else [1, 8])
    peak = peaks(device, clock)
    hardware = (
        torch.cuda.get_device_name(device) if clock.on_gpu else f"one thread, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"{hardware}, torch {torch.__version__}, medians of {args.repeat} turns")
    print(", ".join(f"{name} {rate / 1e9:.1f} {'GB/s' if name == 'copy' else 'GOP/s'}" for name, rate in peak.items()))
    for label in args.models:
        measure(label, args, device, clock, peak)


if __name__ == "__main__":
    main()
