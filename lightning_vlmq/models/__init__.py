"""Vision-language models: one interface, the loaders behind it, and the embedded zoo."""

from lightning_vlmq.models.attention import ExplicitAttention, Projection, make_layers_explicit
from lightning_vlmq.models.loading import known_vlm, load_origin, load_vlm, origin, split_name
from lightning_vlmq.models.provenance import RANDOM, Provenance
from lightning_vlmq.models.vlm import TOWERS, VLM, require_finite

__all__ = [
    "RANDOM",
    "TOWERS",
    "VLM",
    "ExplicitAttention",
    "Projection",
    "Provenance",
    "known_vlm",
    "load_origin",
    "load_vlm",
    "make_layers_explicit",
    "origin",
    "require_finite",
    "split_name",
]
