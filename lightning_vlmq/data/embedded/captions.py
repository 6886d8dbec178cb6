"""Captions of the embedded data set: a small grammar with real variety, and the prompts that go with it.

A caption names the garment by one of several nouns, may tell how bright it is (measured on the image, so it is true), and may tell
the background colour.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# Fashion-MNIST's own class names, in label order, with the nouns a caption may use for them.
NOUNS: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t-shirt", "tee", "short-sleeved top"),
    "trouser": ("trouser", "pair of trousers", "pair of pants"),
    "pullover": ("pullover", "sweater", "jumper"),
    "dress": ("dress", "gown", "summer dress"),
    "coat": ("coat", "jacket", "overcoat"),
    "sandal": ("sandal", "open shoe", "strappy sandal"),
    "shirt": ("shirt", "blouse", "button-up shirt"),
    "sneaker": ("sneaker", "running shoe", "trainer"),
    "bag": ("bag", "handbag", "purse"),
    "ankle boot": ("ankle boot", "boot", "leather boot"),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 50, 45),
    "orange": (235, 140, 40),
    "yellow": (225, 210, 60),
    "green": (50, 150, 65),
    "teal": (40, 165, 170),
    "blue": (45, 85, 200),
    "purple": (135, 60, 180),
    "pink": (240, 130, 180),
}
_SHADES = ("dark", "grey", "light")
_OPENINGS = (
    "a photo of a",
    "a picture of a",
    "an image of a",
    "a product shot of a",
    "a catalogue photo of a",
    "a small photo of a",
    "for sale a",
    "a",
)
_PLACES = ("on a {} background", "in front of a {} wall", "against {}", "on {} paper")

# Prompts for zero-shot classification; the class name fills the braces.
TEMPLATES: tuple[str, ...] = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a product shot of a {}",
    "a catalogue photo of a {}",
    "a small photo of a {}",
    "a {}",
)


def write_captions(
    class_names: Sequence[str], colours: Sequence[str], brightness: Tensor, generator: torch.Generator
) -> list[str]:
    """Write one caption an image.

    Args:
        class_names: the class of each image, keys of :data:`NOUNS`.
        colours: the background colour of each image, keys of :data:`COLOURS`.
        brightness: mean grey value of each garment in 0..1, float ``[n]``.
        generator: source of the random choices.

    Returns:
        ``n`` captions.
    """
    draws = torch.rand(len(class_names), 5, generator=generator).tolist()
    captions = []
    for name, colour, value, (noun, opening, shade, place, which) in zip(
        class_names, colours, brightness.tolist(), draws
    ):
        words = [_pick(_OPENINGS, opening)]
        if shade < 0.5:
            words.append(_SHADES[min(int(value * 3), 2)])
        words.append(_pick(NOUNS[name], noun))
        if place < 0.5:
            words.append(_pick(_PLACES, which).format(colour))
        captions.append(re.sub(r"\ba (?=[aeiou])", "an ", " ".join(words)))
    return captions


def all_phrases() -> list[str]:
    """Every fragment that a caption or prompt can hold: what a tokenizer's vocabulary has to cover."""
    nouns = [noun for group in NOUNS.values() for noun in group]
    return [
        *_OPENINGS,
        *_SHADES,
        *nouns,
        *COLOURS,
        *(p.format("red") for p in _PLACES),
        *(t.format("coat") for t in TEMPLATES),
    ]


def _pick(options: Sequence[str], draw: float) -> str:
    return options[int(draw * len(options))]
