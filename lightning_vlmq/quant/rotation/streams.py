"""Which residual streams a VLM has that one rotation can run through, and who writes to and reads from each.

Those of SliceGPT's Theorem 1 (Ashkboos et al. 2024, arXiv 2401.15024), with LayerNorm converted as in its section 3.2.
A tower is taken only where every part of it is of an exactly known class with exactly known children; anything else is
refused with a reason, never guessed at.
"""

from __future__ import annotations

from typing import Any

import open_clip
import timm.layers
from open_clip import transformer as oc
from open_clip.timm_model import TimmModel
from timm.layers.attention import Attention
from timm.models import vision_transformer as tv
from torch import nn

from lightning_vlmq.models.attention import ExplicitAttention, ExplicitVisionTransformer
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.rotation.residual import (
    NoStream,
    Slot,
    Stream,
    Values,
    check_unshared,
    check_widths,
    known_as,
)

LAYER_SCALES = (oc.LayerScale, timm.layers.LayerScale)


def find_stream(vlm: VLM, tower: str) -> Stream:
    """Describe a tower's residual stream.

    Known are open_clip's vision and text transformers (with CoCa's attentional pooler, and its text decoder, which goes
    on with the text tower's stream) and timm's vision transformer (with SigLIP's attention pooling) in open_clip's
    adapter, all with the ordinary block: LayerNorm, attention, LayerNorm, MLP.

    Args:
        vlm: not rotated yet; quantized or not.
        tower: ``vision`` or ``text``.

    Raises:
        NoStream: the tower is of another structure, or shares a layer with something else.
    """
    model = vlm.model
    if tower == "text":
        stream = _text(model)
    elif type(model.visual) is TimmModel:
        stream = _timm_vision(model.visual)
    else:
        stream = _open_clip_vision(model.visual)
    check_widths(stream)
    check_unshared(vlm, stream)
    return stream


def _open_clip_vision(visual: Any) -> Stream:
    children = {"conv1", "patch_dropout", "ln_pre", "transformer", "attn_pool", "attn_pool_contrastive", "ln_post"}
    known_as(visual, ExplicitVisionTransformer, children | {"proj"}, {"class_embedding", "positional_embedding"})
    patches = _last(visual.conv1)
    stream = Stream(visual.transformer.width, pixels=[patches])
    tables: list[Slot] = [(visual, "class_embedding"), (visual, "positional_embedding")]
    _start(stream, (visual, "ln_pre"), patches, tables)
    _open_clip_blocks(stream, visual.transformer)
    pool = visual.attn_pool
    if pool is None:
        # pooling picks or averages tokens, which a linear layer may follow as well as precede
        _end(stream, (visual, "ln_post"), None if visual.output_tokens else visual.proj)
    elif visual.attn_pool_contrastive is not None:
        _end(stream, (visual, "ln_post"), None)
    else:
        known_as(pool, oc.AttentionalPooler, {"attn", "ln_q", "ln_k"}, {"query"})
        attention = _attention(stream, pool.attn)
        stream.readers.append(((pool, "ln_k"), [attention.k_proj, attention.v_proj]))
    return stream


def _last(embedding: nn.Module) -> Any:
    """The layer whose output a patch embedding hands out: itself, or the last of several convolutions."""
    return embedding[-1] if type(embedding) is nn.Sequential else embedding


def _text(model: Any) -> Stream:
    children = {"transformer", "token_embedding", "ln_final", "text_projection"}
    if type(model) is open_clip.CLIP:
        text = model
        known_as(text, open_clip.CLIP, children | {"visual"}, {"positional_embedding", "logit_scale", "logit_bias"})
    else:
        text = getattr(model, "text", None)
        known_as(text, oc.TextTransformer, children, {"positional_embedding", "cls_emb"})
    stream = Stream(text.transformer.width)
    stream.tables += [(text.token_embedding, "weight"), (text, "positional_embedding")]
    known_as(text.token_embedding, nn.Embedding, set(), {"weight"})
    if text.token_embedding.max_norm is not None:
        raise NoStream("its token embedding is renormalised in use")
    class_token, tokens = getattr(text, "cls_emb", None) is not None, getattr(text, "output_tokens", False)
    if class_token:
        stream.tables.append((text, "cls_emb"))
    _open_clip_blocks(stream, text.transformer)
    _end(stream, (text, "ln_final"), None if tokens and not class_token else text.text_projection)
    if tokens and class_token:  # the tokens handed out are the stream itself: only CoCa's decoder is known to take it
        if type(model) is not open_clip.CoCa:
            raise NoStream("it hands out its tokens un-normalised")
        decoder = model.text_decoder
        known_as(decoder, oc.MultimodalTransformer, {"resblocks", "cross_attn", "ln_final", "text_projection"}, set())
        for block in decoder.resblocks:
            _open_clip_block(stream, block, crosses=False)
        for block in decoder.cross_attn:
            _open_clip_block(stream, block, crosses=True)
        _end(stream, (decoder, "ln_final"), decoder.text_projection)
    return stream


def _open_clip_blocks(stream: Stream, transformer: Any) -> None:
    known_as(transformer, oc.Transformer, {"resblocks"}, set())
    for block in transformer.resblocks:
        _open_clip_block(stream, block, crosses=False)


def _open_clip_block(stream: Stream, block: Any, crosses: bool) -> None:
    """One block; where it ``crosses``, keys and values come from another stream than the queries."""
    children = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"} | ({"ln_1_kv"} if crosses else set())
    known_as(block, oc.ResidualAttentionBlock, children, set())
    known_as(block.mlp, nn.Sequential, {"c_fc", "gelu", "c_proj"}, set())
    attention = _attention(stream, block.attn)
    own = [attention.q_proj] if crosses else [attention.q_proj, attention.k_proj, attention.v_proj]
    stream.readers += [((block, "ln_1"), own), ((block, "ln_2"), [block.mlp.c_fc])]
    stream.writers += [(attention.out_proj, _scale(block, "ls_1")), (block.mlp.c_proj, _scale(block, "ls_2"))]


def _attention(stream: Stream, attention: Any) -> Any:
    known_as(attention, ExplicitAttention, {"q_proj", "k_proj", "v_proj", "out_proj"}, set())
    stream.values.append(Values(attention.v_proj, 0, attention.out_proj, attention.num_heads))
    return attention


def _timm_vision(visual: Any) -> Stream:
    trunk = visual.trunk
    children = {"patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm"}
    known_as(trunk, tv.VisionTransformer, children | {"head_drop", "head"}, {"cls_token", "reg_token", "pos_embed"})
    known_as(visual, TimmModel, {"trunk", "head"}, set())
    known_as(visual.head, nn.Sequential, {"drop", "proj", "mlp"}, set())
    known_as(trunk.patch_embed, timm.layers.PatchEmbed, {"proj", "norm"}, set())
    patches = _last(trunk.patch_embed.proj)
    stream = Stream(trunk.embed_dim, pixels=[patches])
    tables: list[Slot] = [
        (trunk, n) for n in ("cls_token", "reg_token", "pos_embed") if getattr(trunk, n, None) is not None
    ]
    if not isinstance(trunk.patch_embed.norm, nn.Identity) and isinstance(trunk.norm_pre, nn.Identity):
        raise NoStream("a norm ends its patch embedding")
    _start(stream, (trunk, "norm_pre"), patches, tables)
    for block in trunk.blocks:
        _timm_block(stream, block)
    pool, last = trunk.attn_pool, "norm" if isinstance(trunk.fc_norm, nn.Identity) else "fc_norm"
    if last == "fc_norm" and not (isinstance(trunk.norm, nn.Identity) and pool is None and _pools_linearly(trunk)):
        raise NoStream("it pools before its last norm in a way that no rotation commutes with")
    follower = None
    if type(pool) is timm.layers.AttentionPoolLatent:
        follower = _latent_pool(stream, pool)
    elif pool is None and _pools_linearly(trunk):
        heads = [
            trunk.head,
            getattr(visual.head, "proj", None),
            getattr(getattr(visual.head, "mlp", None), "fc1", None),
        ]
        follower = next((head for head in heads if isinstance(head, nn.Linear)), None)
    _end(stream, (trunk, last), follower)
    return stream


def _pools_linearly(trunk: Any) -> bool:
    return trunk.global_pool in ("token", "avg")


def _timm_block(stream: Stream, block: Any) -> None:
    known_as(block, tv.Block, {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}, set())
    attention, mlp = block.attn, block.mlp
    known_as(attention, Attention, {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}, set())
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise NoStream("a norm follows its attention")
    known_as(mlp, timm.layers.Mlp, {"fc1", "act", "drop1", "norm", "fc2", "drop2"}, set())
    stream.readers += [((block, "norm1"), [attention.qkv]), ((block, "norm2"), [mlp.fc1])]
    stream.writers += [(attention.proj, _scale(block, "ls1")), (mlp.fc2, _scale(block, "ls2"))]
    made = attention.num_heads * attention.head_dim
    stream.values.append(Values(attention.qkv, 2 * made, attention.proj, attention.num_heads))


def _latent_pool(stream: Stream, pool: Any) -> nn.Linear:
    """The layer of SigLIP's attention pooling that reads the stream. What it makes leaves the tower unrotated."""
    children = {"q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"}
    known_as(pool, timm.layers.AttentionPoolLatent, children, {"latent"})
    if isinstance(pool.proj, nn.Linear):
        stream.values.append(Values(pool.kv, pool.kv.out_features // 2, pool.proj, pool.num_heads))
    return pool.kv


def _start(stream: Stream, norm: Slot, patches: nn.Conv2d, tables: list[Slot]) -> None:
    """What the stream starts from: a norm, or without one the patches and tables themselves."""
    if isinstance(getattr(*norm), nn.Identity):
        stream.writers.append((patches, None))
        stream.tables += tables
    else:
        stream.entries.append(norm)


def _end(stream: Stream, norm: Slot, follower: Any) -> None:
    """The stream's last norm: folded into the linear layer that follows, or an exit where there is none."""
    if isinstance(follower, nn.Linear):
        stream.readers.append((norm, [follower]))
    else:
        stream.exits.append(norm)


def _scale(block: nn.Module, name: str) -> Slot | None:
    scale = getattr(block, name)
    if isinstance(scale, nn.Identity):
        return None
    if type(scale) not in LAYER_SCALES:
        raise NoStream(f"its '{name}' is a {type(scale).__name__}")
    return block, name
