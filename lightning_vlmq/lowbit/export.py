"""Encoders as programs that run with torch and torchao alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.core.errors import VLMQError, first_line
from lightning_vlmq.models import VLM

PROGRAMS = {"vision": "image_encoder.pt2", "text": "text_encoder.pt2"}
TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")
"""Where each operation came from: most of a small program's size, and of no use in another process."""


class Encoder(nn.Module):
    """One tower of a VLM as a module of its own, without the parts that only the other one uses.

    Args:
        vlm: the model; its parameters are shared, and it is not changed.
        tower: ``vision`` or ``text``.
    """

    def __init__(self, vlm: VLM, tower: str) -> None:
        super().__init__()
        self.tower = tower
        self.vlm = copy.copy(vlm)
        self.vlm._modules = dict(vlm._modules)
        self.vlm.model = model = copy.copy(vlm.model)
        for kind in ("_modules", "_parameters", "_buffers"):
            parts = getattr(model, kind)
            own = {n: p for n, p in parts.items() if vlm.tower_of(f"model.{n}") == tower}
            setattr(model, kind, {n: p for n, p in own.items() if not vlm.in_decoder(f"model.{n}.")})

    def forward(self, x: Tensor) -> Tensor:
        """Unit-norm features ``[batch, dim]`` of pixels or token ids, as the VLM's encoders take them."""
        return self.vlm.encode_image(x) if self.tower == "vision" else self.vlm.encode_text(x)


def export_encoder(
    vlm: VLM, tower: str, path: str | Path, pixels: Literal["uint8", "float32"] = "uint8"
) -> torch.export.ExportedProgram:
    """Write one encoder as a program of ``torch.export``, with a batch of any size.

    In a new process: ``import torch, torchao; encode = torch.export.load(path).module(); features = encode(x)``.

    Args:
        vlm: a model in evaluation mode, converted or not, on the device that the program is for.
        tower: ``vision``: pixels ``[batch, 3, image_size, image_size]`` to unit-norm features ``[batch, dim]``; ``text``: token
            ids, int64 ``[batch, context_length]``, to the same.
        path: the file, replaced atomically.
        pixels: what the image program takes: ``uint8`` in 0..255 or ``float32`` in 0..1.

    Returns:
        The program.

    Raises:
        VLMQError: the model does something that cannot be exported.
    """
    device, size = vlm.mean.device, vlm.image_size
    images = torch.zeros(2, 3, size, size, dtype=getattr(torch, pixels), device=device)
    example = images if tower == "vision" else vlm.tokenize(["a photo", "a drawing"]).to(device)
    try:
        with torch.no_grad():
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(Encoder(vlm, tower).eval(), (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises what it likes
        reason = first_line(error)
        raise VLMQError(f"the {tower} encoder of '{vlm.name}' cannot be exported: {reason}") from error
    for node in program.graph.nodes:
        for key in TRACES:
            node.meta.pop(key, None)
    path = Path(path)
    with (
        replacing(path) as partial,
        open(partial, "wb") as file,
    ):  # a file: of a path the name would be written inside it
        torch.export.save(program, file)
    return program
