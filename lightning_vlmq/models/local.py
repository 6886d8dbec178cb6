"""Features of an image's patches in the space that images and texts share, as GL-MCM compares them with class names."""

from __future__ import annotations

import math
from typing import Any

from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.attention import ExplicitVisionTransformer
from lightning_vlmq.models.vlm import VLM


def encode_patches(vlm: VLM, pixels: Tensor) -> Tensor:
    """Embed every patch of images: from where the tower last mixes patches, each one goes on alone.

    A vision transformer with a class token mixes them last in the attention of its last block, where each patch then sees
    itself only, i.e. its own value (Zhou et al. 2022; Miyai et al. 2023, section 3.2). A tower that pools patches, by attention
    or by their mean, pools one patch at a time.

    Args:
        vlm: full precision or quantized.
        pixels: as :meth:`~lightning_vlmq.models.VLM.preprocess` takes them, ``[batch, 3, height, width]``.

    Returns:
        Unit-norm features, float32 ``[batch, patches, dim]``; zeros for a patch of which nothing is left, e.g. where few bits round
        all of its activations to zero; NaN for one whose activations overflow.

    Raises:
        VLMQError: the vision tower is of a structure for which this is not defined.
    """
    visual, images = vlm.model.visual, vlm.preprocess(pixels)
    if isinstance(visual, ExplicitVisionTransformer):
        features = _open_clip_patches(visual, images)
    elif isinstance(visual, TimmModel):
        features = _timm_patches(vlm.name, visual, images)
    else:
        raise _undefined(vlm.name, visual)
    features = features.unflatten(0, (len(images), -1))
    overflows = ~features.norm(dim=-1, keepdim=True).isfinite()  # which normalising would make zeros of
    return F.normalize(features, dim=-1).masked_fill(overflows, math.nan)


def _open_clip_patches(visual: Any, images: Tensor) -> Tensor:
    tokens = visual._embeds(images)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    if visual.attn_pool is not None:
        return visual.proj(visual._pool(_alone(last(tokens)[:, 1:]))[0])
    patches = last(_alone(tokens[:, 1:])) if visual.pool_type == "tok" else _alone(last(tokens)[:, 1:])
    return visual.proj(visual.ln_post(patches.squeeze(1)))


def _timm_patches(name: str, visual: TimmModel, images: Tensor) -> Tensor:
    trunk: Any = visual.trunk
    features = trunk.forward_features(images)
    if features.ndim == 4 and getattr(trunk, "output_fmt", "NCHW") == "NCHW":
        patches = features.flatten(2).mT.flatten(0, 1)[:, :, None, None]
    elif features.ndim == 3 and trunk.num_prefix_tokens == 0 and trunk.global_pool in ("avg", "map"):
        patches = _alone(features)
    else:
        raise _undefined(name, trunk)
    return visual.head(trunk.forward_head(patches))


def _alone(tokens: Tensor) -> Tensor:
    """Tokens ``[batch, length, width]`` as sequences of one, ``[batch * length, 1, width]``."""
    return tokens.flatten(0, 1).unsqueeze(1)


def _undefined(name: str, tower: nn.Module) -> VLMQError:
    return VLMQError(
        f"patches of '{name}' have no features of their own ({type(tower).__name__}); leave out the OOD score 'gl_mcm'"
    )
