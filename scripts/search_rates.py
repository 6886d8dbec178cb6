"""Search the rates of quantization-aware training on caption pairs that it does not see, and print a table in Markdown.

Usage:
    python scripts/search_rates.py --models vit_clean --bits W4A8 --weight-lr 0.003 0.01 --step-lr 0.001 0.003
    python scripts/search_rates.py --models vit_clean convnext_clean siglip_clean coca_clean align_clean  # the default rates

Each line is one fit of ``configs/qat.yaml``'s length. Losses are contrastive distillation's, a divergence in nats, on the held-out
tenth of the pairs: of min-max and GPTQ with the same bits, of the method before it trains, and of what training ends with.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import time
import warnings

import torch
from lightning import Trainer, seed_everything

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.modules import QATModule, Quantization
from lightning_vlmq.quant import quantize
from lightning_vlmq.quant.training import contrastive_distillation

HEAD = (
    "| model | method | bits | weights' rate | steps' rate | min-max | GPTQ | start | end | s |\n" + "|---" * 10 + "|"
)


def fit(vlm: str, quant: Quantization, rates: tuple[float | None, float | None], epochs: int, pairs: int) -> QATModule:
    """One fit without evaluation; the module comes back with its losses on held-out pairs."""
    seed_everything(0, verbose=False)
    module = QATModule(vlm, quant=quant, weight_lr=rates[0], step_lr=rates[1])
    data = EmbeddedData(datasets=["garments"], per_class=1, calibration_pairs=pairs, train_batch_size=32)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return module


@torch.no_grad()
def without_training(vlm: VLM, method: str, quant: Quantization, data: EmbeddedData) -> float:
    """The loss of a post-training method on the held-out pairs of :func:`fit`."""
    batches = data.calibration_batches()
    calibration = [{"image": b["image"], "tokens": vlm.tokenize(b["caption"])} for b in batches]
    images, tokens = (torch.cat([b[key] for b in calibration])[9::10] for key in ("image", "tokens"))
    student = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})
    scheme = quant.scheme()
    assert scheme is not None
    quantize(student, method, scheme, calibration)
    text = vlm.encode_text(tokens)
    own = student.encode_text(tokens) if "text" in scheme.towers else text
    teacher = vlm.encode_image(images)
    return float(contrastive_distillation(student.encode_image(images), own, teacher, text, vlm.logit_scale()))


def main() -> None:
    """Command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["vit_clean"])
    parser.add_argument("--methods", nargs="+", default=["lsq_contrastive"])
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A8", "W3A8", "W2A8"])
    parser.add_argument("--scope", default="vision")
    parser.add_argument("--weight-lr", nargs="+", type=float, default=[None])
    parser.add_argument("--step-lr", nargs="+", type=float, default=[None])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    for name, bits in itertools.product(options.models, options.bits):
        weight_bits, act_bits = map(int, bits[1:].split("A"))
        plain = Quantization(method="minmax", weight_bits=weight_bits, act_bits=act_bits, scope=options.scope)
        data = EmbeddedData(datasets=["garments"], per_class=1, calibration_pairs=options.pairs, train_batch_size=32)
        data.setup("fit")
        vlm = load_vlm(name)
        before = [f"{without_training(vlm, method, plain, data):.2e}" for method in ("minmax", "gptq")]
        for method, *rates in itertools.product(options.methods, options.weight_lr, options.step_lr):
            quant = Quantization(method=method, weight_bits=weight_bits, act_bits=act_bits, scope=options.scope)
            began = time.perf_counter()
            module = fit(name, quant, (rates[0], rates[1]), options.epochs, options.pairs)
            losses = module.held_out_losses
            cells = [name, method, bits, f"{module.weight_lr:g}", f"{module.step_lr:g}", *before]
            cells += [f"{losses[0]:.2e}", f"{min(losses):.2e}", f"{time.perf_counter() - began:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
