"""What open_clip's weights were trained with that their tensors do not show: activation and preprocessing, of a tag or of a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import digest
from lightning_vlmq.models.weights import is_openais

log = logging.getLogger(__name__)

Activation = Literal["gelu", "quick_gelu"]

ARCHITECTURE = "architecture"
"""In place of a tag: a file's weights were trained as the architecture's own config says."""


@dataclass(frozen=True)
class Recipe:
    """What weights were trained with that their tensors do not show.

    Attributes:
        quick_gelu: whether the towers' activation is OpenAI's QuickGELU, x * sigmoid(1.702 x).
        preprocess: entries of open_clip's preprocessing config: mean, std, interpolation, resize_mode, fill_color.
    """

    quick_gelu: bool
    preprocess: Mapping[str, Any]


def recipe_of_tag(name: str, tag: str, config: Mapping[str, Any], activation: Activation | None) -> Recipe:
    """What open_clip says of a tag. An architecture that says QuickGELU itself, of a tag that does not, is refused."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.is_pretrained_cfg(name, tag):
        raise unknown(f"pretrained tag for {name}", tag, tags)
    said = open_clip.get_pretrained_cfg(name, tag)
    quick = bool(said.get("quick_gelu", False))
    if is_quick(config) and not quick and activation is None:
        raise VLMQError(
            f"'{name}' is built with QuickGELU, but open_clip lists '{tag}' as trained with GELU; take an architecture without "
            "QuickGELU, or say which is right by activation: gelu or quick_gelu"
        )
    if quick != is_quick(config) and activation is None:
        log.info("'%s' is built with QuickGELU, as '%s' was trained", name, tag)
    return Recipe(quick, said)


def recipe_of_file(
    name: str, path: Path, config: Mapping[str, Any], trained_like: str | None, activation: Activation | None
) -> Recipe:
    """Of a file: as it is told, as OpenAI's archives always are, or as all tags of the architecture agree."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    own = Recipe(is_quick(config), {})
    if trained_like == ARCHITECTURE:
        return own
    if trained_like is not None:
        return recipe_of_tag(name, trained_like, config, activation)
    if "openai" in tags and is_openais(path):
        return recipe_of_tag(name, "openai", config, activation)
    recipes = [
        Recipe(bool(c.get("quick_gelu", False)), c) for c in (open_clip.get_pretrained_cfg(name, t) for t in tags)
    ]
    known = {digest({"quick_gelu": r.quick_gelu, **_decisive(r.preprocess)}) for r in recipes}
    if len(known) > 1:
        raise VLMQError(
            f"'{path}' does not say how it was trained, and the weights known for '{name}' differ in activation or "
            f"preprocessing; set trained_like to one of {', '.join(tags)}, or to {ARCHITECTURE}"
        )
    if recipes:
        return recipes[0]
    log.warning("no weights are known for '%s': '%s' is taken to be trained with open_clip's defaults", name, path)
    return own


def _decisive(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {key: preprocess.get(key) for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")}


def is_quick(config: Mapping[str, Any]) -> bool:
    """Whether an architecture's own config says QuickGELU."""
    return bool(config.get("quick_gelu", False))
