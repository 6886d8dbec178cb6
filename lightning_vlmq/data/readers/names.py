"""Class names and prompts that belong to published data sets."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo

from lightning_vlmq.core.errors import VLMQError, unknown

IMAGENET = tuple(IMAGENET_CLASSNAMES)
"""The 1,000 names of Radford et al. 2021 in the order of the sorted wnids; two names stand for two classes each."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CIFAR_PHOTOS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "imagenet": tuple(t("{}") for t in OPENAI_IMAGENET_TEMPLATES),
    "imagenet_simple": tuple(t("{}") for t in SIMPLE_IMAGENET_TEMPLATES),
    # Radford et al. 2021, prompts published with the model: with "a" and with "the", and small and big ones
    "cifar": tuple(
        prompt
        for article in ("a", "the")
        for prompt in (
            *(f"a {photo}photo of {article} {{}}." for photo in _CIFAR_PHOTOS),
            f"a photo of {article} small {{}}.",
            f"a photo of {article} big {{}}.",
        )
    ),
    "photo": ("a photo of a {}.",),
    "person": ("a photo of a person with {}.",),
}
"""Prompts by name: the 80 and the 7 of OpenAI for ImageNet, the 18 for CIFAR-10 and CIFAR-100, and single ones."""

OF_IMAGENET: Mapping[str, Any] = {"class_names": IMAGENET, "templates": TEMPLATES["imagenet"]}
"""Classes of a set that has ImageNet's, as fields of :class:`~lightning_vlmq.data.EvalSet`."""

CLASS_NAMES: Mapping[str, tuple[str, ...]] = {"imagenet": IMAGENET, "cifar10": CIFAR10}
"""Class names by name, in label order."""


@cache
def imagenet_labels() -> Mapping[str, int]:
    """ImageNet-1k's classes: wnid to label, the rank among the sorted wnids."""
    return {wnid: label for label, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


@cache
def imagenet_subset(letter: str) -> tuple[str, ...]:
    """The 200 sorted wnids of ImageNet-A (``"a"``) or ImageNet-R (``"r"``), Hendrycks et al. 2021."""
    listed = pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_synsets.txt")
    assert listed is not None
    return tuple(listed.decode().split())


def resolve_class_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Class names from a name of :data:`CLASS_NAMES`, a text file with one a line in label order, or the names themselves.

    Raises:
        VLMQError: neither a known name nor a file, or no names in it.
    """
    if not isinstance(given, str):
        names = tuple(given)
    elif given in CLASS_NAMES:
        return CLASS_NAMES[given]
    elif Path(given).is_file():
        names = tuple(filter(None, (line.strip() for line in Path(given).read_text().splitlines())))
    else:
        raise unknown("class_names (or file of them)", given, CLASS_NAMES)
    if len(names) < 2:
        raise VLMQError(f"class_names must be at least 2 names, got {len(names)}; give one a class, in label order")
    return names


def resolve_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """Prompts from a name of :data:`TEMPLATES`, or the prompts themselves.

    Raises:
        VLMQError: an unknown name, no prompt, or one without exactly one ``{}`` for the class name.
    """
    if isinstance(given, str):
        if given not in TEMPLATES:
            raise unknown("templates", given, TEMPLATES)
        return TEMPLATES[given]
    bad = [t for t in given if t.count("{}") != 1 or t.replace("{}", "").count("{") + t.replace("{}", "").count("}")]
    if not given or bad:
        raise VLMQError(f"each of the templates needs one {{}} for the class name; '{bad[0] if bad else ''}' has not")
    return tuple(given)
