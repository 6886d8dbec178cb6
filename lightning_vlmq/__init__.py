"""Quantization of CLIP-like vision-language models, and what it does to their reliability beyond top-1 accuracy."""

import logging

# torchao 0.18 registers an enum in a way that torch 2.14 calls outdated, on every import
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

__version__ = "0.1.0"
