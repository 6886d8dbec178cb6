"""Vision towers of the embedded zoo that open_clip takes from timm, by name; each in its family's own class, sized for 64x64 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

_STAGES = [
    ["er_r1_k3_s2_e2_c48"],
    ["er_r1_k3_s2_e2_c96"],
    ["er_r2_k3_s2_e2_c192"],
    ["ir_r2_k3_s1_e4_c256_se0.25"],
]


@register_model
def convnext_embedded(pretrained: bool = False, **kwargs: Any) -> ConvNeXt:
    """A ConvNeXt (Liu et al. 2022) for 64x64 images: overlapping stem of stride 4, small depthwise kernels, no layer scale; 1.8 M."""
    tower = ConvNeXt(
        stem_type="overlap_tiered",
        kernel_sizes=(5, 3, 3, 3),  # five on maps as small as the later ones costs a CPU fifty times as much as three
        depths=(1, 1, 3, 1),
        dims=(48, 96, 192, 256),
        ls_init_value=None,
        **_of_model(kwargs),
    )
    return _sized(tower)


@register_model
def vit_siglip_embedded(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SigLIP's vision transformer for 64x64 images: early convolutions, 16 tokens, features pooled by attention ("map"); 1.9 M."""
    tower = VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=192,
        depth=4,
        num_heads=6,
        mlp_ratio=2,
        class_token=False,
        **_of_model(kwargs),
    )
    tower.patch_embed.proj = early_convolutions(192)
    return tower


@register_model
def efficientnet_embedded(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """An EfficientNet of the second version (Tan & Le 2021: fused early stages) for 64x64 images: stem of stride 2, four stages; 2.9 M."""
    return _sized(
        EfficientNet(decode_arch_def(_STAGES), stem_size=24, num_features=512, act_layer=nn.ReLU, **_of_model(kwargs))
    )


def early_convolutions(width: int, channels: Sequence[int] = (32, 64, 128, 192)) -> nn.Sequential:
    """A patch embedding of convolutions, each of stride 2 (Xiao et al. 2021, Early Convolutions Help Transformers See Better).

    Maps images ``[n, 3, h, w]`` to ``[n, width, h / 16, w / 16]`` for the four default channels. A small transformer learns from
    few images with it.
    """
    layers: list[nn.Module] = []
    for inside, outside in zip((3, *channels), channels):
        layers += [nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))


def _of_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What timm hands to an entry point, without what is about pre-trained weights."""
    return {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}


def _sized(model: Any) -> Any:
    """Tell open_clip's adapter the size of the tower's images; its last feature map has two by two cells."""
    model.default_cfg = {"pool_size": (2, 2), "input_size": (3, 64, 64)}
    return model
