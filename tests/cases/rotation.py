"""Models of every tower type with nothing left at its initial value, for the tests of rotations."""

from collections.abc import Callable

import open_clip
import torch
from open_clip.transformer import LayerScale
from timm.layers import LayerScale as TimmLayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cases.quant import build
from lightning_vlmq.core.preprocessing import Framing, Preprocessing
from lightning_vlmq.models import VLM, zoo

VISION = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 2, "head_width": 16}
TEXT = {"context_length": 12, "width": 36, "heads": 3, "layers": 2}


def clip(vision: dict | None = None, text: dict | None = None, custom_text: bool = False, dim: int = 20) -> VLM:
    """A small open_clip model whose towers differ from the plain ones in the settings given."""
    tokenizer = zoo.WordTokenizer(TEXT["context_length"])
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(
        dim, VISION | (vision or {}), TEXT | {"vocab_size": tokenizer.vocab_size} | (text or {}), quick_gelu=custom_text
    )
    return VLM(model, tokenizer, "small", "none", Preprocessing(Framing(32), (0.5,) * 3, (0.25,) * 3)).eval()


def of_the_zoo(name: str) -> VLM:
    """A zoo model itself, of the embedded models' own size, with random weights."""
    torch.manual_seed(0)
    return zoo.build(name).eval()


def timm_vit(pool: str = "avg", projection: bool = True, **settings: object) -> VLM:
    """The zoo's SigLIP model with another of timm's vision transformers in it."""
    vlm = build("siglip_clean")
    trunk = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=0, global_pool=pool, **settings
    )
    vlm.model.visual.trunk = trunk.eval()
    vlm.model.visual.head = nn.Sequential()
    if projection:
        vlm.model.visual.head.add_module("proj", nn.Linear(48, 96, bias=False))
    return vlm


STREAMS: dict[str, tuple[Callable[[], VLM], tuple[str, ...]]] = {
    "clip": (lambda: build("vit_clean"), ("vision", "text")),
    "siglip": (lambda: build("siglip_clean"), ("vision", "text")),
    "coca": (lambda: build("coca_clean"), ("vision", "text")),
    "align": (lambda: build("align_clean"), ("text",)),
    "convnext": (lambda: build("convnext_clean"), ("text",)),
    "layer scale": (lambda: clip({"ls_init_value": 0.1}, {"ls_init_value": 0.1}), ("vision", "text")),
    "no first norm": (
        lambda: clip(
            {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}
        ),
        ("vision", "text"),
    ),
    "two poolers": (
        lambda: clip({"attentional_pool": "parallel", "attn_pooler_queries": 4, "attn_pooler_heads": 4}, dim=48),
        ("vision", "text"),
    ),
    "no projection": (lambda: clip(text={"proj_type": "none"}, custom_text=True, dim=36), ("vision", "text")),
    "class token in text": (lambda: clip(text={"embed_cls": True}, custom_text=True), ("vision", "text")),
    "timm average": (
        lambda: timm_vit("avg", class_token=True, reg_tokens=2, init_values=0.1, no_embed_class=True, qkv_bias=False),
        ("vision", "text"),
    ),
    "timm token": (lambda: timm_vit("token", pre_norm=True, qk_norm=True), ("vision", "text")),
    "timm without projection": (lambda: timm_vit("avg", projection=False, fc_norm=False), ("vision", "text")),
    "timm maximum": (lambda: timm_vit("max", fc_norm=False, class_token=False), ("vision", "text")),
    "timm pooled latent": (lambda: timm_vit("map", class_token=False, proj_bias=False), ("vision", "text")),
    "early convolutions": (lambda: of_the_zoo("vit_clean"), ("vision", "text")),
    "early convolutions of timm": (lambda: of_the_zoo("siglip_clean"), ("vision", "text")),
    "custom blocks": (lambda: clip({"qk_norm": True, "scale_fc": True}, {"scale_attn": True}, custom_text=True), ()),
    "timm maximum, then norm": (lambda: timm_vit("max", class_token=False), ("text",)),
}
"""By name: how to build a model, and which of its towers have a residual stream that can be rotated."""


def randomize(vlm: VLM, seed: int) -> VLM:
    """Draw every norm's gain and bias, every LayerScale and every other bias anew, far from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for module in vlm.modules():
            if isinstance(module, LayerScale | TimmLayerScale):
                module.gamma.copy_(0.3 + 0.1 * draw(module.gamma).clamp(-2, 2))
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.weight.copy_(1 + 0.4 * draw(module.weight).clamp(-2, 2))
                module.bias.copy_(0.5 * draw(module.bias))
            elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.add_(0.3 * draw(module.bias))
    return vlm


def outputs(vlm: VLM, batch: dict[str, Tensor]) -> list[Tensor]:
    """All that the towers hand out, not normalised: image and text features, tokens where there are some, captions."""
    visual, text = vlm.model.visual, getattr(vlm.model, "text", vlm.model.encode_text)
    with torch.no_grad():
        handed = [visual(vlm.preprocess(batch["image"])), text(batch["tokens"])]
        tensors = [t for out in handed for t in (out if isinstance(out, tuple) else (out,))]
        if vlm.has_decoder:
            tensors = [tensors[0], tensors[1], tensors[2]]  # the text tower's tokens are the decoder's stream itself
            tensors.append(vlm.caption_logits(vlm.image_tokens(batch["image"]), batch["tokens"]))
    return tensors


def relative_errors(after: list[Tensor], before: list[Tensor]) -> list[float]:
    assert len(after) == len(before)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(after, before)]
