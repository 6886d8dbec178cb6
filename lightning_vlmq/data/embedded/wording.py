"""Captions of the embedded benchmark: a small grammar over Unicode's names and keywords, and the prompts that go with it.

A caption names the concept by its name or one of its keywords, in one of several ways, and may tell the background colour. Alt texts
of the web are often wrong or say nothing; the noisy source imitates both.
"""

from __future__ import annotations

import random
import re

from lightning_vlmq.data.embedded.concepts import Concept, concepts
from lightning_vlmq.data.embedded.scenes import COLOURS

OPENINGS = (
    "a drawing of",
    "a picture of",
    "an icon of",
    "an image of",
    "an emoji showing",
    "a sticker of",
    "a small illustration of",
    "clip art of",
)
PLACES = ("on a {} background", "on {} paper", "against {}", "in front of a {} wall")
VAGUE = (
    "a picture",
    "an icon",
    "an image",
    "clip art",
    "a small drawing",
    "untitled drawing",
    "emoji",
    "a sticker {}",
    "a picture {}",
    "an image {}",
)

TEMPLATES: tuple[str, ...] = ("{}", "a drawing of {}", "a picture of {}", "an icon of {}", "an emoji showing {}")
"""Prompts for zero-shot classification; the class name fills the braces."""


def usable_keywords(concept: Concept) -> tuple[str, ...]:
    """The keywords of plain words (no emoticons), three words at most, that are not the name itself."""
    return tuple(
        k
        for k in concept.keywords
        if re.fullmatch(r"[A-Za-z0-9' -]+", k) and k.count(" ") < 3 and k.lower() != concept.name.lower()
    )


class Writer:
    """Writes captions.

    Args:
        seed: of the random choices; the same calls in the same order give the same captions.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._keywords = [usable_keywords(c) for c in concepts()]

    def caption(self, concept: int, colour: str) -> str:
        """A caption that is true.

        Args:
            concept: index into :func:`~lightning_vlmq.data.embedded.concepts.concepts`.
            colour: the background's, a key of :data:`~lightning_vlmq.data.embedded.scenes.COLOURS`.
        """
        pick, keywords = self._random, self._keywords[concept]
        noun = concepts()[concept].name
        if keywords and pick.random() < 0.15:
            noun = pick.choice(keywords)
        words = noun if pick.random() < 0.3 else f"{pick.choice(OPENINGS)} {noun}"
        if keywords and pick.random() < 0.4:
            words += ", " + " ".join(pick.sample(keywords, min(len(keywords), pick.choice((1, 2)))))
        if pick.random() < 0.3:
            words += " " + pick.choice(PLACES).format(colour)
        return words

    def vague(self, colour: str) -> str:
        """A caption that names nothing."""
        return self._random.choice(VAGUE).format(self._random.choice(PLACES).format(colour))


def all_phrases() -> list[str]:
    """Every fragment that a caption or prompt can hold, and the names of the concepts never trained: the vocabulary's source."""
    return [
        *OPENINGS,
        *COLOURS,
        *(p.format("red") for p in PLACES),
        *(v.format("") for v in VAGUE),
        *(t.format("") for t in TEMPLATES),
        *(c.name for c in concepts()),
        *(k for c in concepts() if c.trained for k in usable_keywords(c)),
        ",",
    ]
