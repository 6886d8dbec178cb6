"""Time and memory of post-training quantization beside torchao's own way on the same linears. Run by hand.

    python benchmarks/quantize.py --images imagenet-sample.parquet      # ViT-B-32, 256 images; minutes
    python benchmarks/quantize.py --model vit_clean --images-n 64 --repeat 1

A model with random weights is quantized by ours and by torchao 0.18, each in a process of its own, in turns. Both do the
plain linear layers of the scope and nothing else (torchao has no convolutions), from the same images, at the same number
format: 8-bit weights, symmetric, a step per output channel; activations 8 bits with one static step (smoothquant,
minmax) or as they are (gptq, awq: torchao's are for weights alone). What torchao has no name for on a CPU:

gptq         GPTQConfig asserts CUDA, and ends by waiting for CUDA. The same code runs here with assertions off
             (python -O) and that wait skipped. Its other formats need a CUDA library (int4) or CUDA (nvfp4).
minmax       SmoothQuantConfig(alpha=None), which torchao names as its fall-back to plain static quantization.
smoothquant  as torchao does it by default, keeping every input; its observer that keeps running maxima fails on static
             configs (torchao 0.18).

Seconds are processor time of all threads, so that a busy machine does not tell; of --repeat runs the median. Memory is the
process' peak while quantizing, with the model's own weights, over those weights' size. Error is that of the image features
against full precision, ||z_q - z|| / ||z||: alike where the two did the same job.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from cells import CellError, run_cell
from torch import Tensor, nn

Batches = list[dict[str, Tensor]]
METHODS = ("minmax", "smoothquant", "awq", "gptq")
WEIGHT_ONLY = ("awq", "gptq")
CONTENDERS = ("ours", "torchao")
BATCH = 32


def load_model(name: str) -> nn.Module:
    from lightning_vlmq.models import load_vlm, zoo

    torch.manual_seed(0)
    return load_vlm(name, None if name in zoo.buildable() else "none")


def load_batches(vlm: nn.Module, path: str | None, count: int) -> Batches:
    size = vlm.image_size
    if path is None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        images = (smooth * 255).to(torch.uint8)
    else:
        from lightning_vlmq.data.images.encoded import decode_images, read_parquet

        encoded = read_parquet(Path(path), ["image"])["image"].to_pylist()[:count]
        images = decode_images(encoded, Path(path), "RGB", "error")[0]
    texts = vlm.tokenize([f"a photo of {i} things" for i in range(len(images))])
    return [{"image": i, "tokens": t} for i, t in zip(images.split(BATCH), texts.split(BATCH))]


def is_plain_linear(module: nn.Module) -> bool:
    """Not open_clip's projections, which are applied as ``x @ layer``: torchao's replacements do not answer that."""
    return type(module) is nn.Linear


def ours(vlm: nn.Module, method: str, scope: str, batches: Batches) -> None:
    from lightning_vlmq.quant import LayerRule, QuantScheme, quantize

    others = [n for n, m in vlm.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not is_plain_linear(m)]
    scheme = QuantScheme(
        act_bits=16 if method in WEIGHT_ONLY else 8,
        act_symmetric=True,
        scope=scope,
        overrides=[LayerRule(name, skip=True) for name in others if scope == "vision_text" or "visual" in name],
    )
    quantize(vlm, method, scheme, batches, minimum_coverage=0.0)


def torchao(vlm: nn.Module, method: str, scope: str, batches: Batches) -> None:
    from torchao.prototype.awq import AWQConfig
    from torchao.prototype.gptq import GPTQConfig
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8WeightOnlyConfig, PerRow, PerTensor, quantize_
    from torchao.quantization.quant_api import Int8StaticActivationInt8WeightConfig

    weights = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    static = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()], set_inductor_config=False)
    prepare, convert = {
        "gptq": (GPTQConfig("observe", weights), GPTQConfig("convert", weights)),
        "awq": (AWQConfig(weights, "prepare"), AWQConfig(weights, "convert")),
        "smoothquant": (SmoothQuantConfig(static, "prepare"), SmoothQuantConfig(static, "convert")),
        "minmax": (SmoothQuantConfig(static, "prepare", None), SmoothQuantConfig(static, "convert", None)),
    }[method]
    part = vlm.model.visual if scope == "vision" else vlm.model
    chosen = {name for name, module in part.named_modules() if is_plain_linear(module)}
    quantize_(part, prepare, lambda _, name: name in chosen)
    with torch.no_grad():
        for batch in batches:
            vlm.encode_image(batch["image"])
            if scope == "vision_text":
                vlm.encode_text(batch["tokens"])
        torch.cuda.synchronize = lambda: None  # see the top
        with contextlib.redirect_stdout(io.StringIO()):  # gptq counts aloud
            quantize_(part, convert, lambda _, name: name in chosen)


def measure(method: str, contender: str, args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    run = {"ours": ours, "torchao": torchao}[contender]
    small = load_model("vit_clean")
    run(small, method, args.scope, load_batches(small, None, 4))  # imports and first-call costs
    vlm = load_model(args.model)
    batches = load_batches(vlm, args.images, args.images_n)
    with torch.no_grad():
        reference = vlm.encode_image(batches[0]["image"])
    model_bytes = sum(t.numel() * t.element_size() for t in {*vlm.parameters(), *vlm.buffers()})
    before = _resident(reset=True)
    began = time.process_time()
    run(vlm, method, args.scope, batches)
    seconds = time.process_time() - began
    peak = _resident(reset=False)
    with torch.no_grad():
        error = (vlm.encode_image(batches[0]["image"]) - reference).norm() / reference.norm()
    memory = (model_bytes + peak - before) / model_bytes
    return {"seconds": seconds, "memory": memory, "error": error.item(), "model_bytes": model_bytes}


def _resident(reset: bool) -> int:
    """Bytes of memory held now, from where on the peak then counts (``reset``), or that peak. Linux."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS" if reset else "VmHWM"].split()[0]) * 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, or an embedded model")
    parser.add_argument("--scope", choices=("vision", "vision_text"), default="vision")
    parser.add_argument("--images", help="Parquet file with a column 'image' of PNG or JPEG files, all of one size")
    parser.add_argument("--images-n", type=int, default=256)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.cell:
        print(json.dumps(measure(*args.cell, args)))
        return
    shown = "generated images" if args.images is None else f"images of {Path(args.images).name}"
    print(f"{args.model}, {args.scope}, {args.images_n} {shown}, {args.threads} threads, medians of {args.repeat}")
    print(f"{'method':13}{'contender':12}{'CPU s':>8}{'memory':>9}{'error':>9}{'ours / it':>11}")
    names = ("model", "scope", "images", "images-n", "threads")
    for method in args.methods:
        runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        for _ in range(args.repeat):
            for contender in runs:
                cell = method, contender
                try:  # without assertions, see the top
                    runs[contender].append(run_cell(__file__, cell, args, names, ["-O"], CUDA_VISIBLE_DEVICES=""))
                except CellError as error:
                    sys.exit(f"{method} {contender} failed: {error}")
        middle = {c: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for c, rs in runs.items()}
        for contender, found in middle.items():
            ratio = "" if contender == "ours" else f"{middle['ours']['seconds'] / found['seconds']:11.2f}"
            cells = f"{found['seconds']:8.1f}{found['memory']:8.2f}x{found['error']:9.4f}{ratio}"
            print(f"{method:13}{contender:12}{cells}", flush=True)


if __name__ == "__main__":
    main()
