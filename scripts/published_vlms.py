"""Builds the published study's VLMs at full size with random weights, quantizes each, and prints how much of it was.

Nothing is fetched: a tokenizer that is not at hand is replaced by random token ids, which coverage does not depend on.

    python scripts/published_vlms.py [--vlm clip_vit_b32_wit ...] [--method minmax gptq quarot] [--bits 8]
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing, Preprocessing
from lightning_vlmq.models import RANDOM, VLM, openclip
from lightning_vlmq.models.vlm import draw_missing_weights
from lightning_vlmq.quant import QuantScheme, quantize

FOLDER = Path(__file__).parents[1] / "configs" / "vlm"
ALIGN_SIZE = 289


def published() -> dict[str, dict[str, str]]:
    """The configs' ``vlm`` and ``pretrained`` by the configs' names."""
    return {p.stem: yaml.safe_load(p.read_text())["model"]["init_args"] for p in sorted(FOLDER.glob("*.yaml"))}


def random_tokens(length: int, n_words: int) -> Any:
    """A stand-in for a tokenizer: the same random ids for the same number of texts."""

    def tokenize(texts: list[str]) -> Tensor:
        ids = torch.randint(2, n_words, (len(texts), length), generator=torch.Generator().manual_seed(0))
        return ids.index_fill(1, torch.tensor([length - 1]), n_words - 1)  # CLIP pools where the id is largest

    return tokenize


def build(vlm: str, pretrained: str | None = None) -> VLM:
    """One of them, with random weights, the activation that its weights need and their preprocessing."""
    torch.manual_seed(0)
    if vlm.startswith("hf-hub:"):
        return _align(vlm)
    config = open_clip.get_model_config(vlm)
    said = open_clip.get_pretrained_cfg(vlm, pretrained or "")
    config["quick_gelu"] = bool(said.get("quick_gelu", False))
    model = openclip.build(vlm, config)
    draw_missing_weights(model)
    text = config["text_cfg"]
    try:
        needs_hub = "hf_tokenizer_name" in text or "siglip" in vlm.lower()
        tokenize = (
            random_tokens(text["context_length"], text["vocab_size"]) if needs_hub else openclip.tokenizer_of(vlm)
        )
    except VLMQError:
        tokenize = random_tokens(text["context_length"], text["vocab_size"])
    return VLM(model, tokenize, vlm, RANDOM, openclip.preprocessing(model, said, vlm)).eval()


def _align(name: str) -> VLM:
    from transformers import AlignConfig, AlignModel

    from lightning_vlmq.models.huggingface import ALIGN_LENGTH, TransformersModel

    config = AlignConfig()
    config.vision_config.image_size = ALIGN_SIZE
    model = TransformersModel(AlignModel(config))
    _normalise(model)
    seen = Preprocessing(Framing(ALIGN_SIZE, "squash", resize_to=346), (0.5,) * 3, (0.5,) * 3)
    return VLM(model, random_tokens(ALIGN_LENGTH, config.text_config.vocab_size), name, RANDOM, seen).eval()


@torch.no_grad()
def _normalise(model: nn.Module) -> None:
    """Batch norms get the statistics of a few random images; at their start, random weights let fifty layers vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain mean
    model.encode_image(torch.randn(4, 3, ALIGN_SIZE, ALIGN_SIZE, generator=torch.Generator().manual_seed(2)))
    model.eval()


def row(name: str, vlm: VLM, method: str, bits: int, images: int = 4) -> str:
    """One line of the table: quantizes a copy of the model."""
    size = vlm.image_size
    pixels = torch.randint(
        0, 256, (images, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    batch = {"image": pixels, "tokens": vlm.tokenize(["a photo"] * images)}
    quantized = copy.deepcopy(vlm)
    start = time.perf_counter()
    report = quantize(quantized, method, QuantScheme(bits, 8, scope="vision_text"), [batch]).coverage
    seconds = time.perf_counter() - start
    with torch.no_grad():
        cosine = (quantized.encode_image(pixels) * vlm.encode_image(pixels)).sum(1).mean().item()
    shares = [
        f"{share:.1%}"
        for tower in ("vision", "text")
        for share in (report.weight_share((tower,)), report.mac_share((tower,)))
    ]
    millions = sum(p.numel() for p in vlm.parameters()) / 1e6
    left = ", ".join(report.unquantized) or "none"
    return f"| {name} | {millions:.0f} | {method} | {' | '.join(shares)} | {left} | {cosine:.4f} | {seconds:.0f} |"


def main() -> None:
    """Print the table, random weights throughout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", nargs="+", default=list(published()), choices=list(published()))
    parser.add_argument("--method", nargs="+", default=["minmax", "gptq", "quarot"])
    parser.add_argument("--bits", type=int, default=8, help="bits per weight; activations have 8")
    args = parser.parse_args()
    print(
        f"Random weights, W{args.bits}A8, both towers; shares of matrix weights and multiply-accumulates that are quantized.\n"
    )
    print(
        "| config | M parameters | method | vision weights | vision MACs | text weights | text MACs | left out | cosine | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in args.vlm:
        vlm = build(**published()[name])
        for method in args.method:
            print(row(name, vlm, method, args.bits), flush=True)
        del vlm
        gc.collect()


if __name__ == "__main__":
    main()
