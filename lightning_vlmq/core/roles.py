"""What an evaluation set is for: said here, once."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.core.registry import Registry


@dataclass(frozen=True)
class Role:
    """The part that an evaluation set plays.

    Attributes:
        title: what it is called where people read.
        heading: likewise where there is little room, as above a column; the title if not given.
        is_averaged: whether a study has many sets of it, whose mean stands for the role.
        is_ood: whether its samples have no class among those that can be predicted (target -1).
        is_scored: whether OOD scores are recorded of its samples: those that are told apart by them, in distribution and out of it.
        is_classwise: whether class-wise errors are kept for it: a state of bins times classes per set is too much for
            hundreds of corrupted sets.
    """

    title: str
    heading: str = ""
    is_averaged: bool = False
    is_ood: bool = False
    is_scored: bool = False
    is_classwise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "heading", self.heading or self.title)


ROLES: Registry[Role] = Registry("role")
"""Every role by name, in display order. Every sample has one, and every row but those about the model alone (role ``""``)."""

for _name, _role in {
    "id": Role("in-distribution", is_scored=True, is_classwise=True),
    "near_ood": Role("near out-of-distribution", "near-OOD", is_ood=True, is_scored=True),
    "far_ood": Role("far out-of-distribution", "far-OOD", is_ood=True, is_scored=True),
    "corruption": Role("corruptions", is_averaged=True),
    "shift": Role("semantic shift", is_averaged=True, is_classwise=True),
    "spurious": Role("spurious correlation", is_classwise=True),
}.items():
    ROLES.register(_name)(_role)
