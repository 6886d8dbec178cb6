"""Quantized attention products: ``Q K^T`` and ``A V`` in 8 bits, whatever module computes them.

These products have no weights, so that no quantized layer holds them, and by default they stay in float. SmoothQuant (Xiao et
al. 2023, section 4 and Figure 6) computes them in INT8 too. All attention here, open_clip's made explicit, timm's and
transformers', calls ``scaled_dot_product_attention``: modules that do are found by running the model, and each gets an
:class:`AttentionProducts` that stands in for that function while the module runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchao.quantization.granularity import PerTensor, PerToken

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.scheme import QuantScheme

NAME = "attention_products"
"""The attribute of an attention module that holds its :class:`AttentionProducts`."""
BITS = {"int8": 8}
"""Bits of each setting of :attr:`~lightning_vlmq.quant.QuantScheme.attention` but ``float``."""


class AttentionProducts(nn.Module):
    """``softmax(Q K^T scale + mask) V`` with fake-quantized queries, keys, values and probabilities; the softmax is in float.

    Queries, keys and probabilities have one step per tensor (or per token, as the scheme says), values always one per tensor, as their
    tokens are what the second product sums over. Ranges are the smallest and largest values seen, whatever the method.

    Args:
        scheme: whose activations' symmetry, granularity and dynamic ranges these have too.

    Attributes:
        q: quantizer of queries ``[..., length, channels]``.
        k: of keys ``[..., source, channels]``.
        v: of values ``[..., source, channels]``.
        probabilities: of probabilities ``[..., length, source]``, on an unsigned grid.
    """

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__()
        bits, dynamic = BITS[scheme.attention], scheme.act_dynamic
        row = PerToken() if scheme.act_granularity == "per_token" else PerTensor()
        self.q, self.k = (FakeQuantizer(bits, scheme.act_symmetric, row, dynamic=dynamic) for _ in "qk")
        self.v = FakeQuantizer(bits, scheme.act_symmetric, PerTensor(), dynamic=dynamic)
        self.probabilities = FakeQuantizer(bits, False, row, dynamic=dynamic)

    @property
    def quantizers(self) -> dict[str, FakeQuantizer]:
        """The four quantizers by attribute."""
        return {name: getattr(self, name) for name in ("q", "k", "v", "probabilities")}

    @property
    def quantizes(self) -> bool:
        """Whether the products are quantized right now."""
        return all(quantizer.enabled for quantizer in self.quantizers.values())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As :func:`torch.nn.functional.scaled_dot_product_attention`, argument by argument; a row masked throughout gives NaN."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.q(query) @ self.k(key).transpose(-2, -1) * factor
        if is_causal:
            length, source = scores.shape[-2:]
            attn_mask = torch.ones(length, source, dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return F.dropout(self.probabilities(scores.softmax(-1)), dropout_p) @ self.v(value)

    @staticmethod
    def macs(query: Tensor, key: Tensor, value: Tensor) -> int:
        """Multiply-accumulates of both products."""
        return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


class _Replacing(TorchFunctionMode):
    """While active, what is called in place of ``scaled_dot_product_attention``."""

    def __init__(self, stand_in: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stand_in = stand_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.stand_in(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention_products(model: nn.Module) -> dict[str, AttentionProducts]:
    """Every module's quantized products by their own qualified name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionProducts)}


def install_attention(vlm: VLM, scheme: QuantScheme, run: Callable[[], object]) -> list[str]:
    """Give each attention of the scope's towers quantized products, in place; nothing where the scheme leaves them in float.

    Args:
        vlm: the model.
        scheme: says how, and for which towers.
        run: runs the encoders in scope once, in full precision.

    Returns:
        The attention modules' names; none where a tower has no attention.
    """
    if scheme.attention not in BITS:
        return []
    found = [name for name in find_attention(vlm, run) if vlm.tower_of(name) in scheme.towers]
    device = next(vlm.parameters()).device
    for name in found:
        module = vlm.get_submodule(name)
        module.add_module(NAME, AttentionProducts(scheme).to(device).train(module.training))
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    return found


def find_attention(vlm: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the innermost modules that are running whenever ``scaled_dot_product_attention`` is called, in that order."""
    running: list[str] = []
    found: dict[str, None] = {}
    real = F.scaled_dot_product_attention

    def note(*args: Any, **kwargs: Any) -> Tensor:
        found[running[-1]] = None
        return real(*args, **kwargs)

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    hooks = []
    for name, module in vlm.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.no_grad(), _Replacing(note):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


_ACTIVE: dict[int, list[_Replacing]] = {}


def _enter(module: nn.Module, args: Sequence[Any]) -> None:
    mode = _Replacing(getattr(module, NAME))
    _ACTIVE.setdefault(id(module), []).append(mode)
    mode.__enter__()


def _leave(module: nn.Module, args: Sequence[Any], output: Any) -> None:
    modes = _ACTIVE.get(id(module))
    if modes:  # none where forward was never reached
        modes.pop().__exit__(None, None, None)


def static_products(vlm: VLM) -> dict[str, FakeQuantizer]:
    """The static quantizers of attention products by qualified name, whose ranges calibration has to find."""
    return {
        f"{name}.{part}": quantizer
        for name, products in attention_products(vlm).items()
        for part, quantizer in products.quantizers.items()
        if not quantizer.dynamic
    }
