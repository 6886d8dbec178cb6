"""Class names and prompts that belong to published data sets."""

from __future__ import annotations

import logging
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.data.text import read_lines

log = logging.getLogger(__name__)

ClassNames = str | Sequence[str] | Mapping[str, str]
"""What classes may be named by: a name of :data:`CLASS_NAMES`, a file, names in label order, or names by folder."""

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
    """Class names from a name of :data:`CLASS_NAMES`, a text file with one per line in label order, or the names themselves.

    Raises:
        VLMQError: neither a known name nor a file, or no names in it.
    """
    if not isinstance(given, str):
        names = tuple(given)
    elif given in CLASS_NAMES:
        return CLASS_NAMES[given]
    elif Path(given).is_file():
        lines = list(read_lines(Path(given)))
        names = tuple(name for _, name in lines)
        if why := _no_names(Path(given).suffix.lower(), names):
            raise VLMQError(
                f"class_names '{given}' {why}, its first line is '{names[0][:60]}': leave one name per line and nothing else, in a file "
                ".txt, or give the names as a list"
            )
    else:
        raise unknown("class_names (or file of them)", given, CLASS_NAMES)
    if len(names) < 2:
        raise VLMQError(f"class_names must be at least 2 names, got {len(names)}; give one per class, in label order")
    return _none_blank(names)


def class_order(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Names of classes in the order that makes them labels: by number where all are whole numbers, as text otherwise.

    Raises:
        VLMQError: two names are the same number (``1`` and ``01``).
    """
    distinct = set(names)
    if not all(name.isascii() and name.isdecimal() for name in distinct):
        return tuple(sorted(distinct))
    ordered = sorted(distinct, key=lambda name: (int(name), name))
    for name, other in pairwise(ordered):
        if int(name) == int(other):
            raise VLMQError(f"classes '{name}' and '{other}' of {where} are the same number; name each number once")
    return tuple(ordered)


def name_classes(folders: Sequence[str], given: ClassNames, where: str, what: str = "classes") -> tuple[str, ...]:
    """What classes are called that have names of their own already, those of their folders. How they are matched is said.

    Args:
        folders: the classes' own names, in label order.
        given: names by class; or one per class in their order, as :func:`resolve_class_names` takes them.
        where: what messages call that which has these classes.
        what: what messages call them.

    Raises:
        VLMQError: another number of names than of classes, a class without a name, or an order that is not plain: ``class_10``
            comes before ``class_2`` as text, after it to a reader.
    """
    if isinstance(given, Mapping):
        if odd := sorted(set(given) ^ set(folders)):
            why = "is no class" if odd[0] in given else "has no name"
            raise VLMQError(f"'{odd[0]}' {why}: class_names have to name each of the {len(folders)} classes of {where}")
        return _none_blank(tuple(given[folder] for folder in folders))
    names = resolve_class_names(given)
    if len(names) != len(folders):
        raise VLMQError(f"{where} has {len(folders)} {what}, class_names are {len(names)}; name each once")
    by_number = sorted(
        folders, key=lambda name: [int(part) if k % 2 else part for k, part in enumerate(_NUMBER.split(name))]
    )
    if by_number != list(folders) == sorted(folders):
        k = next(k for k, (a, b) in enumerate(zip(folders, by_number)) if a != b)
        raise VLMQError(
            f"class_names go by the order of the classes of {where}, which is not plain: is '{folders[k]}' or "
            f"'{by_number[k]}' number {k + 1}? give class_names as a mapping, class: name"
        )
    pairs = [f"'{folder}' is '{name}'" for folder, name in zip(folders, names)]
    shown = pairs if len(pairs) < 4 else [*pairs[:2], "…", pairs[-1]]
    if names != tuple(folders):
        log.warning("classes of %s are named in order: %s", where, ", ".join(shown))
    return names


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are numbers or WordNet ids, which prompts say nothing with."""
    return bool(names) and all(name.isdecimal() or _WORDNET.fullmatch(name) for name in names)


def _none_blank(names: tuple[str, ...]) -> tuple[str, ...]:
    if odd := [name for name in names if not isinstance(name, str)]:
        raise VLMQError(f"class names are texts, got {odd[0]!r}")
    if blank := [k for k, name in enumerate(names) if not name.strip()]:
        raise VLMQError(f"class name {blank[0] + 1} of {len(names)} is blank; name each class")
    return names


_NUMBER = re.compile(r"([0-9]+)")
_MARKUP = {".json": "", ".yaml": "", ".yml": "", ".csv": ",", ".tsv": "\t"}
"""Suffixes of files that hold more than names, and what shows it; nothing where the suffix is enough."""
_WORDNET = re.compile(r"n[0-9]{8}")
_NUMBERED = re.compile(rf"([0-9]+|{_WORDNET.pattern})([\s:,.)]|$)")


def _no_names(suffix: str, lines: Sequence[str]) -> str:
    """Why a file's lines are not names alone; empty where they may be."""
    if suffix in _MARKUP and any(_MARKUP[suffix] in line for line in lines):
        return f"are {suffix[1:].upper()}"
    found = [match[1] for line in lines if (match := _NUMBERED.match(line))]
    if not lines or len(found) < len(lines):
        return ""
    if all(text.startswith("n") for text in found):
        return "begin with WordNet ids"
    if any(text.startswith("n") for text in found) or all(line.isdecimal() for line in lines):
        return ""
    numbers, n = [int(text) for text in found], len(found)
    return "begin with their numbers" if numbers in (list(range(n)), list(range(1, n + 1))) else ""


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
