"""Small models of the zoo's five families, for tests that need a family's layers and not what it has learned."""

from timm.models import register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_vlmq.models import VLM, zoo

TEXT = {"context_length": 24, "width": 64, "heads": 4, "layers": 2}
IMAGE = {"image_size": 32}
PATCHES = IMAGE | {"patch_size": 8, "width": 96, "head_width": 24}
FAMILIES = {
    "vit": {"embed_dim": 64, "vision_cfg": PATCHES | {"layers": 4}, "text_cfg": TEXT},
    "convnext": {
        "embed_dim": 64,
        "vision_cfg": IMAGE | {"timm_model_name": "convnext_small_case", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "siglip": {
        "embed_dim": 96,
        "custom_text": True,
        "init_logit_scale": 2.303,
        "init_logit_bias": -10,
        "vision_cfg": IMAGE | {"timm_model_name": "vit_siglip_small_case", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "coca": {
        "embed_dim": 64,
        "vision_cfg": PATCHES
        | {
            "layers": 3,
            "attentional_pool": True,
            "attn_pooler_queries": 8,
            "attn_pooler_heads": 4,
            "output_tokens": True,
        },
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"layers": 1, "attn_pooler_heads": 4},
    },
    "align": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": IMAGE | {"timm_model_name": "efficientnet_small_case", "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "first"},
    },
}
"""Configs as the zoo's, by tower."""


def small(name: str) -> VLM:
    """The small model of a family, called like a model of the zoo, in training mode."""
    return zoo.assemble(FAMILIES[name.rsplit("_", 1)[0]], name)


@register_model
def convnext_small_case(pretrained=False, **kwargs):
    return _sized(ConvNeXt(patch_size=2, depths=(1, 1, 2, 1), dims=(32, 64, 96, 128), **_of_model(kwargs)))


@register_model
def vit_siglip_small_case(pretrained=False, **kwargs):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4, "class_token": False}
    return VisionTransformer(**settings, **_of_model(kwargs))


@register_model
def efficientnet_small_case(pretrained=False, **kwargs):
    """Inverted residuals with squeeze-excite and batch norm."""
    stages = [
        ["ds_r1_k3_s1_e1_c24_se0.25"],
        ["ir_r2_k3_s2_e4_c40_se0.25"],
        ["ir_r2_k3_s2_e4_c64_se0.25"],
        ["ir_r1_k3_s2_e4_c96_se0.25"],
    ]
    settings = {"stem_size": 24, "num_features": 192, "act_layer": nn.SiLU}
    return _sized(EfficientNet(decode_arch_def(stages), **settings, **_of_model(kwargs)))


def _of_model(kwargs):
    return {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}


def _sized(model):
    model.default_cfg = {"pool_size": (2, 2), "input_size": (3, 32, 32)}
    return model
