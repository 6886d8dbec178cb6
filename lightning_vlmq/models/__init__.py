"""Vision-language models: the adapter over open_clip and the embedded zoo."""

from lightning_vlmq.models.attention import ExplicitAttention, Projection, make_layers_explicit
from lightning_vlmq.models.vlm import TOWERS, VLM, load_vlm, require_finite

__all__ = ["TOWERS", "VLM", "ExplicitAttention", "Projection", "load_vlm", "make_layers_explicit", "require_finite"]
