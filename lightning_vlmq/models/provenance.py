"""Where a model's weights come from, and what they are."""

from __future__ import annotations

from dataclasses import dataclass, field

EMBEDDED = "embedded"
"""The source that a model of the embedded zoo names."""
RANDOM = "none"
"""The word that asks for random weights, and the source that such a model names."""


@dataclass(frozen=True)
class Provenance:
    """What a VLM was loaded from. Only what decides its features counts as its identity: the content, not the place.

    Attributes:
        source: ``embedded``, an open_clip tag, a file, a folder, a repository, or ``none`` for random weights.
        weights: all of :func:`~lightning_vlmq.core.identity.tensors_digest` of the tensors as loaded.
        architecture: digest of what the model was built from, activation included.
        revision: commit of the repository, where it has one.
    """

    source: str = field(compare=False)
    weights: str
    architecture: str
    revision: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.source} at {self.revision}" if self.revision else self.source

    @property
    def is_random(self) -> bool:
        """Whether the weights were drawn, not trained."""
        return self.source == RANDOM
