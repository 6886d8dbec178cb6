"""Looks through open_clip's whole list for matrix weights that no called layer holds, which quantization would miss.

Every architecture is built on the meta device, without memory or weights, and both encoders run once. Prints one line an architecture:

    python scripts/find_bypassed_layers.py [name ...]
"""

from __future__ import annotations

import sys
from typing import Any

import open_clip
import torch
from torch import nn

from lightning_vlmq.models import make_layers_explicit
from lightning_vlmq.quant.coverage import TABLE_NAME


def bypassed(name: str) -> list[str]:
    """Qualified names of the matrix weights that no called linear or convolution layer holds, tables apart."""
    config: dict[str, Any] = open_clip.get_model_config(name)
    for tower, entry in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if entry.replace("pretrained", "name") in config[tower]:
            config[tower][entry] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CLIP if not custom else open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    with torch.device("meta"):
        model: Any = kind(**config).eval()
        make_layers_explicit(model)
        called: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(lambda m, *_: called.add(m))
        size = model.visual.image_size
        size = size[0] if isinstance(size, tuple | list) else size
        length = config["text_cfg"].get("context_length", 77)
        tokens = torch.zeros(1, length, dtype=torch.int64)
        with torch.no_grad():
            image = torch.zeros(1, 3, size, size)
            if kind is open_clip.CoCa:
                model(image, tokens)
            else:
                model.encode_image(image), model.encode_text(tokens)
    held = {id(p) for module in called for p in module.parameters(recurse=False)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        n
        for n, p in model.named_parameters()
        if sum(side > 1 for side in p.shape) > 1
        and id(p) not in held | tables
        and not TABLE_NAME.search(n.rpartition(".")[2])
    ]


def main(names: list[str]) -> int:
    """Look through the architectures named, or all of them; the exit code is 1 where something was found."""
    found = False
    for name in names or open_clip.list_models():
        try:
            left = bypassed(name)
        except Exception as error:  # text towers of the hub, whose config cannot be fetched offline
            print(
                f"{name}: not built ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]})", flush=True
            )
            continue
        found |= bool(left)
        print(
            f"{name}: {', '.join(left[:4]) if left else 'every matrix weight is in a layer that is called'}", flush=True
        )
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
