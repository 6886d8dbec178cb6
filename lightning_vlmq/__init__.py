"""Quantization of CLIP-like vision-language models, and what it does to their reliability beyond top-1 accuracy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_vlmq.api import QuantizedVLM, evaluate, load_vlm, quantize

__all__ = ["QuantizedVLM", "evaluate", "load_vlm", "quantize"]

# torchao 0.18 registers an enum in a way that torch 2.14 calls outdated, on every import
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The names above, imported when they are asked for: ``vlmq --help`` does without torch."""
    if name in __all__:
        from lightning_vlmq import api

        return getattr(api, name)
    raise AttributeError(f"module 'lightning_vlmq' has no attribute '{name}'")
