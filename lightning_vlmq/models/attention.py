"""Attention and projections as explicit linear layers, so that every matrix weight is a module that can be quantized.

open_clip's blocks call :class:`torch.nn.MultiheadAttention`, whose packed ``in_proj_weight`` is no ``nn.Linear``: a quantizer that walks
linears would silently skip a quarter of the model. Likewise ``visual.proj`` and ``text_projection`` are raw parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Linear):
    """A bias-free linear layer that also answers ``x @ projection``, which is how open_clip applies its raw projection matrices."""

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)


class ExplicitAttention(nn.Module):
    """Multi-head attention with separate ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` linears.

    Numerically equal to the :class:`torch.nn.MultiheadAttention` it is made from (Vaswani et al. 2017, section 3.2.2), and
    callable in its place.

    Args:
        attention: the module to copy weights from; ``batch_first`` must be true, as in every open_clip model.

    Raises:
        NotImplementedError: for ``bias_k``/``add_zero_attn`` or sequence-first inputs, which no CLIP-like model uses.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn or not attention.batch_first:
            raise NotImplementedError("only plain batch-first attention can be made explicit")
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        dim = attention.embed_dim
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(getattr(attention, f"{p}_proj_weight").detach() for p in "qkv")
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases))
        out = attention.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())
        assert self.out_proj.out_features == dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: ``[batch, length, dim]``; ``key`` and ``value``: ``[batch, source, dim]``, float.
            key: see ``query``.
            value: see ``query``.
            key_padding_mask: ``[batch, source]``, true (or ``-inf``) where a key is padding.
            need_weights: must be false; the weights are never formed.
            attn_mask: ``[length, source]`` or ``[batch * heads, length, source]``, boolean (true = masked) or additive float.

        Returns:
            The output ``[batch, length, dim]`` and ``None`` in place of the weights.
        """
        if need_weights:
            raise NotImplementedError("attention weights are not formed; call with need_weights=False")
        batch, length, source = query.shape[0], query.shape[1], key.shape[1]

        def split(x: Tensor) -> Tensor:
            return x.reshape(batch, -1, self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)

        mask = _additive(attn_mask, query.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.reshape(batch, self.num_heads, length, source)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query.dtype)
            assert padding is not None
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        q, k, v = split(self.q_proj(query)), split(self.k_proj(key)), split(self.v_proj(value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, -1)), None


class ExplicitAttentionPool2d(nn.Module):
    """CLIP ResNets' attention pooling (Radford et al. 2021, section 2.4), whose projections run as the layers they are.

    open_clip's hands their weights to a functional. Of the query only its mean token is ever used, so only that is projected.

    Args:
        pool: the module whose layers and position embedding it takes over.
    """

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj
        self.num_heads = pool.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """Pool feature maps ``[batch, channels, height, width]`` to ``[batch, dim]``."""
        tokens = x.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding.to(x.dtype)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(tokens[:, :1])), split(self.k_proj(tokens)), split(self.v_proj(tokens))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(attended.transpose(1, 2).flatten(2))[:, 0]


class ExplicitInnerAttention(nn.Module):
    """open_clip's own attention (that of blocks with normalised queries, scaled heads or an inner norm) with a linear ``in_proj``.

    Args:
        attention: the module whose parts it takes over.

    Raises:
        NotImplementedError: for scaled-cosine attention, which open_clip itself cannot run on batches.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        if attention.scaled_cosine:
            raise NotImplementedError("scaled-cosine attention cannot be made explicit")
        self.in_proj = _linear(attention.in_proj_weight.detach(), attention.in_proj_bias)
        self.num_heads, self.head_scale = attention.num_heads, attention.head_scale
        self.ln_q, self.ln_k, self.ln_inner = attention.ln_q, attention.ln_k, attention.ln_inner
        self.out_proj, self.out_drop = attention.out_proj, attention.out_drop
        self.dropout = attention.attn_drop.p

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend within ``[batch, length, dim]``; the mask is as :class:`ExplicitAttention` takes it."""
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.in_proj(x).chunk(3, dim=-1))
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (len(x), self.num_heads))
        out = F.scaled_dot_product_attention(
            self.ln_q(q), self.ln_k(k), v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        if self.head_scale is not None:
            out = out * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(out.transpose(1, 2).flatten(2))))


class ExplicitVisionTransformer(VisionTransformer):
    """open_clip's vision transformer that calls its projection as the layer it now is.

    open_clip writes ``x @ projection``, which torch.compile cannot trace for a module; text towers ask what it is first.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map preprocessed images to pooled features, with the tokens where the model wants them too."""
        pooled, tokens = self._pool(self.transformer(self._embeds(x)))
        if self.proj is not None:
            pooled = self.proj(pooled)
        return (pooled, tokens) if self.output_tokens else pooled


def make_layers_explicit(model: nn.Module) -> None:
    """Replace, in place, everything in an open_clip model that reads a matrix weight itself by layers that are called.

    These are packed attention, raw projection parameters, and timm's EVA and BEiT attention, which adds its biases by a functional.
    Outputs stay equal up to float32 rounding (1e-5 relative).
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            for kind, explicit in EXPLICIT.items():
                if isinstance(child, kind):
                    setattr(module, name, explicit(child))
        if hasattr(module, "qkv_bias_separate"):
            setattr(module, "qkv_bias_separate", True)  # noqa: B010 - no attribute of nn.Module to a type checker
        for name in ("proj", "text_projection"):
            matrix = module._parameters.get(name)
            if matrix is not None and matrix.ndim == 2:
                # stored [in, out] and applied as x @ matrix; a linear layer holds the transpose
                del module._parameters[name]
                layer = Projection(matrix.shape[0], matrix.shape[1], bias=False)
                layer.weight = nn.Parameter(matrix.detach().T.contiguous())
                setattr(module, name, layer)
        if type(module) is VisionTransformer:
            module.__class__ = ExplicitVisionTransformer


EXPLICIT: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.MultiheadAttention: ExplicitAttention,
    AttentionPool2d: ExplicitAttentionPool2d,
    Attention: ExplicitInnerAttention,
}
"""Modules that hand weights to functionals, and what stands in for them."""


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (true = masked, MultiheadAttention's convention) as the additive one that SDPA takes."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
