"""``vlmq list`` and ``vlmq show``: everything that goes by a name, told by whoever owns it (registries, docstrings, configs)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from lightning_vlmq.commands import WordParser, command
from lightning_vlmq.core.configs import config_names, config_summary, find_config
from lightning_vlmq.core.errors import unknown

_GROUP = "Look around"


@dataclass(frozen=True)
class Entry:
    """Something with a name.

    Attributes:
        summary: one line.
        text: what ``vlmq show`` adds: a description, options, a config, the command that uses it.
    """

    summary: str
    text: str = ""


def _first_line(text: str | None) -> str:
    from lightning_vlmq.experiment import plain

    return plain(inspect.cleandoc(text or "").split("\n\n")[0].replace("\n", " ")).strip()


def _described(thing: Any, use: str) -> Entry:
    """A registered class, dataclass object or function: its docstring (the first paragraph is the summary), options, how to use it."""
    from lightning_vlmq.experiment import plain

    if is_dataclass(thing) and not isinstance(thing, type):
        options = [f"  {f.name} = {getattr(thing, f.name)!r}" for f in fields(thing)]
    else:
        parameters = inspect.signature(thing).parameters.values()
        options = [f"  {p.name} = {p.default!r}" for p in parameters if p.default is not p.empty]
    _, _, more = inspect.cleandoc(thing.__doc__ or "").partition("\n\n")
    parts = [
        *([plain(more)] if more else []),
        *(["options:\n" + "\n".join(options)] if options else []),
        use,
    ]
    return Entry(_first_line(thing.__doc__), "\n\n".join(parts))


def _configs(group: str, use: str) -> dict[str, Entry]:
    found = {}
    for name in config_names(group):
        path = find_config(name)
        short = name.removeprefix(f"{group}/")
        found[short] = Entry(
            config_summary(path), f"{path.read_text(encoding='utf-8')}\n{use.format(name=name, short=short)}"
        )
    return found


def _models() -> dict[str, Entry]:
    import json

    import open_clip

    from lightning_vlmq.models import RANDOM, zoo

    use = "vlmq validate --config eval --model.vlm {}"
    entries = {}
    for name in zoo.names():
        said = zoo.description(name)
        size = f", {said['parameters'] / 1e6:.1f} million parameters" if "parameters" in said else ""
        entries[name] = Entry(
            f"embedded: weights come with the package{size}", f"{json.dumps(said, indent=1)}\n\n{use.format(name)}"
        )
    for name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        shown = ", ".join(tags[:4]) + (f" and {len(tags) - 4} more" if len(tags) > 4 else "")
        told = ", ".join(tags) or f"none, so give a file, or {RANDOM} for random ones"
        tagged = f"{use.format(name)} --model.pretrained {tags[0] if tags else RANDOM}"
        entries[name] = Entry(f"open_clip; weights: {shown or 'none'}", f"weights: {told}\n\n{tagged}")
    return entries


def _methods() -> dict[str, Entry]:
    from lightning_vlmq.quant import METHODS, QATMethod

    entries = {}
    for name in METHODS:
        method = METHODS[name]
        use = "fit --config qat" if method.needs_training else "validate --config eval"
        kind = "control" if method.is_control else "post-training"
        if isinstance(method, QATMethod):
            kind = f"trained, {method.distillation} distillation"
        entry = _described(method, f"vlmq {use} --config quant/{name}")
        entries[name] = Entry(f"{kind}: {entry.summary}", entry.text)
    return entries


def _scores() -> dict[str, Entry]:
    from lightning_vlmq.metrics import OOD_SCORES

    return {
        name: _described(OOD_SCORES[name].function, f"vlmq validate --config eval --model.scores '[{name}]'")
        for name in OOD_SCORES
    }


def _metrics() -> dict[str, Entry]:
    from lightning_vlmq.evaluation.measures import METRICS

    return {
        name: Entry(
            f"{metric.title}; {metric.direction}",
            "\n".join(filter(None, (metric.convention, "definition: docs/metrics.md"))),
        )
        for name, metric in ((name, METRICS[name]) for name in METRICS)
    }


def _corruptions() -> dict[str, Entry]:
    from lightning_vlmq.data.corruptions import CORRUPTIONS

    return {
        name: Entry(f"{CORRUPTIONS[name].family}: {_first_line(CORRUPTIONS[name].apply.__doc__)}", "severities 1 to 5")
        for name in CORRUPTIONS
    }


def _data() -> dict[str, Entry]:
    from lightning_vlmq.data import EmbeddedData

    embedded = _described(EmbeddedData, "vlmq validate --config eval")
    return {"embedded": embedded, **_configs("data", "vlmq data check --config {name} --data.root /datasets")}


PART = "\nname: ???"
"""In a study's config that others are made of, and that is none by itself."""

KINDS: Mapping[str, Callable[[], dict[str, Entry]]] = {
    "models": _models,
    "methods": _methods,
    "scores": _scores,
    "metrics": _metrics,
    "corruptions": _corruptions,
    "data": _data,
    "studies": lambda: {k: e for k, e in _configs("study", "vlmq-study study={short}").items() if PART not in e.text},
    "configs": lambda: _configs("", "--config {name}"),
}
"""What can be listed, by its word."""


@command("list", _GROUP)
def run_list(args: list[str]) -> None:
    """Say what there is: models, methods, scores, metrics, corruptions, data, studies, configs, one line each."""
    parser = WordParser(prog="vlmq list", description="Everything that goes by a name, one line each.")
    parser.add_argument("kind", choices=[*KINDS], help="what to list")
    parser.add_argument("word", nargs="?", default="", help="only those with this in their name")
    if args[:1] not in ([], ["-h"], ["--help"]) and args[0] not in KINDS:
        raise unknown("kind to list", args[0], KINDS)
    given = parser.parse_args(args or ["--help"])
    entries = KINDS[given.kind]()
    shown = {name: entry for name, entry in entries.items() if given.word.lower() in name.lower()}
    if not shown:
        raise unknown(given.kind, given.word, entries)
    left = 0
    if given.kind == "models" and not given.word:  # open_clip's hundred are asked for by a word
        shown = {name: entry for name, entry in entries.items() if entry.summary.startswith("embedded")}
        left = len(entries) - len(shown)
    width = max(map(len, shown))
    for name, entry in shown.items():
        print(f"{name:<{width}}  {entry.summary}")
    if left:
        print(f"and {left} architectures of open_clip, with or without weights: vlmq list models ViT-B")


@command("show", _GROUP)
def run_show(args: list[str]) -> None:
    """Show whatever goes by a name in full: description, options, config, how to use it."""
    parser = WordParser(prog="vlmq show", description="Whatever goes by a name, in full.")
    parser.add_argument("name", help="as vlmq list prints it; KIND/NAME where two kinds share a name")
    name = parser.parse_args(args or ["--help"]).name
    only, _, rest = name.partition("/")
    kinds = {only: rest} if only in KINDS and rest else dict.fromkeys(KINDS, name)
    known: set[str] = set()
    found: list[str] = []
    for kind, wanted in kinds.items():
        if found and kind == "configs":  # data sets and studies are configs: said once
            continue
        entries = KINDS[kind]()
        known |= set(entries)
        if wanted in entries:
            found.append(f"{kind}/{wanted}: {entries[wanted].summary}\n\n{entries[wanted].text}")
    if not found:
        raise unknown("name", name, known)
    print("\n\n".join(found).rstrip())
