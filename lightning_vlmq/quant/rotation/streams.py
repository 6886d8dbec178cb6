"""Which residual streams a VLM has that one rotation can run through, and who writes to and reads from each.

Those of SliceGPT's Theorem 1 (Ashkboos et al. 2024, arXiv 2401.15024), with LayerNorm converted as in its section 3.2.
A tower is taken only where every part of it is of an exactly known class with exactly known children; anything else is
refused with a reason, never guessed at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
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

LAYER_NORMS = (nn.LayerNorm, oc.LayerNorm, oc.LayerNormFp32, timm.layers.LayerNorm, timm.layers.LayerNormFp32)
LAYER_SCALES = (oc.LayerScale, timm.layers.LayerScale)

Slot = tuple[nn.Module, str]
"""Where a module or parameter sits: its owner and its name there."""


class NoStream(Exception):
    """A tower whose residual stream cannot be rotated; the message says why."""


@dataclass(frozen=True)
class Values:
    """An attention's value projection and the linear layer that reads the attended values.

    Attributes:
        source: the layer that makes the values.
        start: its first output channel that is a value (packed layers make queries and keys before).
        out: the layer that reads them.
        heads: number of heads, whose channels lie one head after the other.
    """

    source: nn.Linear
    start: int
    out: nn.Linear
    heads: int


@dataclass
class Stream:
    """One residual stream of a pre-LayerNorm transformer.

    Attributes:
        width: its number of channels.
        entries: norms whose output starts the stream (CLIP's ``ln_pre``).
        tables: parameters ``[..., width]`` that are added to it or start it.
        writers: layers whose output, scaled by the LayerScale where there is one, is added to it or starts it.
        readers: norms that read it, each with all linear layers that read the norm's output and nothing else.
        exits: norms that read it and whose output goes elsewhere too, or to no linear layer.
        values: attention inside the tower.
        pixels: layers that read the image, or the early convolutions' map of it.
    """

    width: int
    entries: list[Slot] = field(default_factory=list)
    tables: list[Slot] = field(default_factory=list)
    writers: list[tuple[nn.Linear | nn.Conv2d, Slot | None]] = field(default_factory=list)
    readers: list[tuple[Slot, list[nn.Linear]]] = field(default_factory=list)
    exits: list[Slot] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    pixels: list[nn.Conv2d] = field(default_factory=list)


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
    _check_widths(stream)
    _check_unshared(vlm, stream)
    return stream


def _open_clip_vision(visual: Any) -> Stream:
    children = {"conv1", "patch_dropout", "ln_pre", "transformer", "attn_pool", "attn_pool_contrastive", "ln_post"}
    _known(visual, ExplicitVisionTransformer, children | {"proj"}, {"class_embedding", "positional_embedding"})
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
        _known(pool, oc.AttentionalPooler, {"attn", "ln_q", "ln_k"}, {"query"})
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
        _known(text, open_clip.CLIP, children | {"visual"}, {"positional_embedding", "logit_scale", "logit_bias"})
    else:
        text = getattr(model, "text", None)
        _known(text, oc.TextTransformer, children, {"positional_embedding", "cls_emb"})
    stream = Stream(text.transformer.width)
    stream.tables += [(text.token_embedding, "weight"), (text, "positional_embedding")]
    _known(text.token_embedding, nn.Embedding, set(), {"weight"})
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
        _known(decoder, oc.MultimodalTransformer, {"resblocks", "cross_attn", "ln_final", "text_projection"}, set())
        for block in decoder.resblocks:
            _open_clip_block(stream, block, crosses=False)
        for block in decoder.cross_attn:
            _open_clip_block(stream, block, crosses=True)
        _end(stream, (decoder, "ln_final"), decoder.text_projection)
    return stream


def _open_clip_blocks(stream: Stream, transformer: Any) -> None:
    _known(transformer, oc.Transformer, {"resblocks"}, set())
    for block in transformer.resblocks:
        _open_clip_block(stream, block, crosses=False)


def _open_clip_block(stream: Stream, block: Any, crosses: bool) -> None:
    """One block; where it ``crosses``, keys and values come from another stream than the queries."""
    children = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"} | ({"ln_1_kv"} if crosses else set())
    _known(block, oc.ResidualAttentionBlock, children, set())
    _known(block.mlp, nn.Sequential, {"c_fc", "gelu", "c_proj"}, set())
    attention = _attention(stream, block.attn)
    own = [attention.q_proj] if crosses else [attention.q_proj, attention.k_proj, attention.v_proj]
    stream.readers += [((block, "ln_1"), own), ((block, "ln_2"), [block.mlp.c_fc])]
    stream.writers += [(attention.out_proj, _scale(block, "ls_1")), (block.mlp.c_proj, _scale(block, "ls_2"))]


def _attention(stream: Stream, attention: Any) -> Any:
    _known(attention, ExplicitAttention, {"q_proj", "k_proj", "v_proj", "out_proj"}, set())
    stream.values.append(Values(attention.v_proj, 0, attention.out_proj, attention.num_heads))
    return attention


def _timm_vision(visual: Any) -> Stream:
    trunk = visual.trunk
    children = {"patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm"}
    _known(trunk, tv.VisionTransformer, children | {"head_drop", "head"}, {"cls_token", "reg_token", "pos_embed"})
    _known(visual, TimmModel, {"trunk", "head"}, set())
    _known(visual.head, nn.Sequential, {"drop", "proj", "mlp"}, set())
    _known(trunk.patch_embed, timm.layers.PatchEmbed, {"proj", "norm"}, set())
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
    _known(block, tv.Block, {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}, set())
    attention, mlp = block.attn, block.mlp
    _known(attention, Attention, {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}, set())
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise NoStream("a norm follows its attention")
    _known(mlp, timm.layers.Mlp, {"fc1", "act", "drop1", "norm", "fc2", "drop2"}, set())
    stream.readers += [((block, "norm1"), [attention.qkv]), ((block, "norm2"), [mlp.fc1])]
    stream.writers += [(attention.proj, _scale(block, "ls1")), (mlp.fc2, _scale(block, "ls2"))]
    made = attention.num_heads * attention.head_dim
    stream.values.append(Values(attention.qkv, 2 * made, attention.proj, attention.num_heads))


def _latent_pool(stream: Stream, pool: Any) -> nn.Linear:
    """The layer of SigLIP's attention pooling that reads the stream. What it makes leaves the tower unrotated."""
    children = {"q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"}
    _known(pool, timm.layers.AttentionPoolLatent, children, {"latent"})
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


def _known(module: Any, kind: type[nn.Module], children: set[str], parameters: set[str]) -> None:
    """Refuse a module of another class, or of that class with parts that this file knows nothing of."""
    if type(module) is not kind:
        raise NoStream(f"a {type(module).__name__} stands where a {kind.__name__} is known")
    present = {n for part in (module._modules, module._parameters) for n, p in part.items() if p is not None}
    if unknown := present - children - parameters:
        raise NoStream(f"its {kind.__name__} has an unknown part '{min(unknown)}'")


def _check_widths(stream: Stream) -> None:
    """Refuse norms that are no LayerNorm over the stream's channels, and layers that are not as wide as it."""
    for owner, name in [*stream.entries, *stream.exits, *(norm for norm, _ in stream.readers)]:
        norm = getattr(owner, name)
        if type(norm) not in LAYER_NORMS or norm.normalized_shape != (stream.width,):
            raise NoStream(f"its '{name}' is a {type(norm).__name__}, no LayerNorm over {stream.width} channels")
    for reader in (layer for _, layers in stream.readers for layer in layers):
        if not isinstance(reader, nn.Linear) or reader.in_features != stream.width:
            raise NoStream(f"a {type(reader).__name__} of another width reads it")
    for writer, _ in stream.writers:
        if not isinstance(writer, nn.Linear | nn.Conv2d) or len(writer.weight) != stream.width:
            raise NoStream(f"a {type(writer).__name__} of another width writes to it")
    for owner, name in stream.tables:
        if getattr(owner, name).shape[-1] != stream.width:
            raise NoStream(f"its table '{name}' is of another width")
    for values in stream.values:
        if not isinstance(values.out, nn.Linear) or len(values.source.weight) != values.start + values.out.in_features:
            raise NoStream("its values do not go to a linear layer one by one")


def _check_unshared(vlm: VLM, stream: Stream) -> None:
    """Refuse a stream whose layers or norms are used in several places: each place would need a fold of its own."""
    places = Counter(id(module) for _, module in vlm.named_modules(remove_duplicate=False))
    norms = [getattr(*s) for s in [*stream.entries, *stream.exits, *(norm for norm, _ in stream.readers)]]
    norms += [getattr(*scale) for _, scale in stream.writers if scale is not None]
    layers: Iterable[nn.Module] = [layer for _, layers in stream.readers for layer in layers]
    used = [*norms, *layers, *(w for w, _ in stream.writers), *(owner for owner, _ in stream.tables)]
    used += [layer for v in stream.values for layer in (v.source, v.out)]
    shared = next((module for module in used if places[id(module)] != 1), None)
    if shared is not None:
        raise NoStream(f"a {type(shared).__name__} is used in several places")
