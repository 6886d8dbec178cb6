"""What fake quantization costs over full precision: a forward, eager and compiled, and a training step. Run by hand.

    python benchmarks/fake_quant.py                                # ViT-B-32, batches of 32
    python benchmarks/fake_quant.py --model vit_clean --batch 125

The same model with random weights, in full precision and quantized (W8A8), encodes the same images in one process, in
turns; a ratio is taken between neighbours, so that what else the machine does meets both. Shown are medians over
--repeat turns. Seconds are processor time of all threads.

forward    the image encoder without gradients, as in evaluation.
compiled   the same, both through torch.compile.
step       forward, backward and an AdamW update of the image encoder on a feature loss, for trained methods.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_vlmq.models import load_vlm, zoo
from lightning_vlmq.quant import METHODS, QATMethod, QuantScheme, quantize

WHAT = ("forward", "compiled", "step")
FORWARD = ("minmax", "smoothquant", "quarot", "lsqplus_contrastive")
TRAINED = tuple(name for name in METHODS if METHODS[name].needs_training and name.endswith("feature"))


def quantized(vlm: nn.Module, method: str, images: Tensor) -> nn.Module:
    own = copy.deepcopy(vlm)
    quantize(own, method, QuantScheme(8, 8), [{"image": images}])
    return own


def forward(vlm: nn.Module, images: Tensor, compiled: bool) -> Callable[[], None]:
    vlm.eval().requires_grad_(False)
    encode = torch.compile(vlm.encode_image, fullgraph=True) if compiled else vlm.encode_image

    def run() -> None:
        with torch.no_grad():
            encode(images)

    return run


def step(vlm: nn.Module, method: str, images: Tensor) -> Callable[[], None]:
    """One update as in quantization-aware training; full precision (``fp32``) trains the same tower on the same loss."""
    with torch.no_grad():
        target = vlm.encode_image(images.roll(1, 0))
    vlm.train()
    if method == "fp32":
        for name, parameter in vlm.named_parameters():
            parameter.requires_grad_(vlm.tower_of(name) == "vision")
        groups = [{"params": [p for p in vlm.parameters() if p.requires_grad]}]
        after: Callable[[], None] = lambda: None  # noqa: E731
    else:
        chosen = METHODS[method]
        assert isinstance(chosen, QATMethod)
        groups = chosen.parameter_groups(vlm, weight_lr=1e-3)
        after = lambda: chosen.keep_steps_positive(vlm)  # noqa: E731
    optimizer = torch.optim.AdamW(groups, lr=1e-5)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(vlm.encode_image(images), target).backward()
        optimizer.step()
        after()

    return run


def compare(label: str, reference: Callable[[], None], run: Callable[[], None], repeat: int, aim: float) -> None:
    """Time both in turns, after a first call of each, and print medians and the median ratio."""
    reference(), run()
    pairs = [(_seconds(reference), _seconds(run)) for _ in range(repeat)]
    ratio = statistics.median(own / full for full, own in pairs)
    full, own = (statistics.median(side) for side in zip(*pairs))
    print(f"{label:36}{full * 1e3:12.1f}{own * 1e3:12.1f}{ratio:9.2f}{aim:9.1f}", flush=True)


def _seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, or an embedded model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--what", nargs="*", default=WHAT, choices=WHAT)
    parser.add_argument("--methods", nargs="*", help="only these; by default some of each kind")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vlm = load_vlm(args.model, None if args.model in zoo.buildable() else "none")
    images = torch.randint(0, 256, (args.batch, 3, vlm.image_size, vlm.image_size), dtype=torch.uint8)
    print(f"{args.model}, batches of {args.batch}, {args.threads} threads, medians of {args.repeat} turns")
    print(f"{'':36}{'FP32 ms':>12}{'W8A8 ms':>12}{'ratio':>9}{'aim':>9}")
    for compiled, aim in ((False, 1.6), (True, 1.2)):
        kind = "compiled" if compiled else "forward"
        if kind not in args.what:
            continue
        full = forward(copy.deepcopy(vlm), images, compiled)
        for method in args.methods or FORWARD:
            compare(
                f"{kind}, {method}", full, forward(quantized(vlm, method, images), images, compiled), args.repeat, aim
            )
    if "step" in args.what:
        full = step(copy.deepcopy(vlm), "fp32", images)
        for method in args.methods or TRAINED:
            compare(f"step, {method}", full, step(quantized(vlm, method, images), method, images), args.repeat, 1.6)


if __name__ == "__main__":
    main()
