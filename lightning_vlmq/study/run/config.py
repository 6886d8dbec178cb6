"""A study's config, checked: what it is called, its axes, and what each of its runs is called with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from lightning_vlmq.core.errors import VLMQError, unknown

KINDS = ("fp32", "ptq", "qat")
"""Kinds of runs: full precision, post-training quantization, quantization-aware training. Each has its command."""

AXES = ("vlm", "method", "bits", "scope")
"""The axes that every study has."""

GROUPS = ("all", "pretrained", "outliers", "quantized", "extra")
"""Groups of ``study.arguments``; which runs each is for is said at :class:`Study`."""

JUDGED_BY = ("fit", "validate", "test")
"""Commands of ``vlmq`` that file results."""

KEPT = ("all", "reference", "none")
"""Which image features a study keeps, see :class:`~lightning_vlmq.evaluation.features.FeatureCache`."""


@dataclass(frozen=True)
class Study:
    """A study's config, as ``configs/study/*.yaml`` spells it.

    Attributes:
        name: the study's folder below ``logs/``.
        root: that folder; results, TensorBoard logs, failures and the report go there.
        axes: ``vlm`` (``embedded`` stands for all embedded models), ``method``, ``bits`` and ``scope``, each a list of names, and where
            planted outlier channels are studied ``outliers``, their factors (1: none); the grid is their product.
        commands: by kind (:data:`KINDS`), the start of the argument list: subcommand and config files.
        arguments: templates of the arguments that decide the result: under ``all`` for every run, under ``pretrained``
            for VLMs written ``name@weights``, under ``outliers`` where they are planted, under ``quantized`` for all but full
            precision, and under ``extra``
            whatever the user adds to every run.
        output: templates of the arguments that only say where things go; they do not count for what a run is.
        data: names of data configs, ``data/imagenet`` without the ``data/``, which every run is evaluated on together; none for the
            commands' own.
        data_root: the folder that their files are below; where it is does not count for what a run is, what is in it does.
        seeds: seeds of everything random, each the whole grid once more; the app's ``seed`` if none.
        shard: the part of the grid that this process runs, ``"2/8"``; see :func:`~lightning_vlmq.study.run.shards.shard_of`.
        cache: which image features are kept: ``"all"``, ``"reference"`` (full precision's), ``"none"``.
        outermost: axis that changes last within a seed, in place of the balanced order: with ``bits``, all runs at the first width come
            before any at the second.
    """

    name: str
    root: str
    axes: Mapping[str, Sequence[str]]
    commands: Mapping[str, Sequence[str]]
    arguments: Mapping[str, Sequence[str]]
    output: Sequence[str]
    data: Sequence[str] = ()
    data_root: str | None = None
    seeds: Sequence[int] | None = None
    shard: str | None = None
    cache: str = "reference"
    outermost: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Study:
        """Check a plain (resolved) config. Raises :class:`VLMQError` for what is missing or unknown."""
        names = list(cls.__dataclass_fields__)
        for name in config:
            if name not in names:
                raise unknown("entry of the study config", str(name), names)
        optional = {name for name, entry in cls.__dataclass_fields__.items() if entry.default is not MISSING}
        if missing := [name for name in names if name not in config and name not in optional]:
            raise VLMQError(f"the study config lacks {', '.join(missing)}; compare the package's config study/base")
        axes = config["axes"] if isinstance(config["axes"], Mapping) else {}
        planted = [axis for axis in ("outliers",) if axis in axes]
        _check_table("axes", config["axes"], (*AXES, *planted))
        _check_table("commands", config["commands"], KINDS)
        _check_table("arguments", config["arguments"], GROUPS, takes_all=False)
        for own in config["commands"].values():
            if own[0] not in JUDGED_BY:
                raise unknown("command of vlmq that files results", own[0], JUDGED_BY)
        _check_words("output", config["output"])
        root = config["root"]
        if not isinstance(root, str) or not root.strip():
            raise VLMQError(f"study.root must be a folder, e.g. study.root=logs/mine; got {root!r}")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", str(config["name"])):
            raise VLMQError(f"study.name '{config['name']}' is no folder name; use letters, digits, '.', '_' and '-'")
        data = config.get("data") or []
        if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
            raise VLMQError(f"study.data must be a list of data configs, e.g. study.data=[imagenet,cc3m]; got {data!r}")
        if data and not config.get("data_root"):
            raise VLMQError("study.data names data sets in files: say where they lie, study.data_root=/datasets")
        if config.get("data_root") and not data:
            raise VLMQError("study.data_root is given, but no data: add study.data=[imagenet,cc3m]")
        seeds = config.get("seeds")
        if seeds is not None and (not isinstance(seeds, list) or not seeds or not all(map(_is_seed, seeds))):
            raise VLMQError(
                f"study.seeds must be a list of whole numbers from 0, e.g. study.seeds=[0,1,2]; got {seeds!r}"
            )
        if config.get("outermost") is not None and config["outermost"] not in AXES:
            raise unknown("axis for study.outermost", str(config["outermost"]), AXES)
        if config.get("cache", "reference") not in KEPT:
            raise unknown("study.cache", str(config["cache"]), KEPT)
        return cls(**config)

    def seeds_or(self, seed: Any) -> list[int]:
        """The study's seeds, or the app's where the study names none.

        Raises:
            VLMQError: both say something, or the app's is no seed.
        """
        if not _is_seed(seed):
            raise VLMQError(f"seed must be a whole number from 0, got {seed!r}; use study.seeds=[0,1] for several")
        if self.seeds is None:
            return [seed]
        if seed:
            raise VLMQError(f"seed={seed} beside study.seeds={list(self.seeds)}; give study.seeds=[{seed}] alone")
        return list(dict.fromkeys(self.seeds))


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_table(name: str, table: Any, keys: Sequence[str], takes_all: bool = True) -> None:
    """Check a table of lists of words; where it takes all, every key must be there and have a word."""
    if not isinstance(table, Mapping):
        raise VLMQError(f"study.{name} must be a table; compare the package's config study/base")
    for key, entries in table.items():
        if key not in keys:
            raise unknown(f"entry of study.{name}", str(key), keys)
        _check_words(f"{name}.{key}", entries)
        if not entries and takes_all:
            raise VLMQError(f"study.{name}.{key} is empty; give it at least one entry")
    if takes_all and (missing := [key for key in keys if key not in table]):
        raise VLMQError(f"study.{name} lacks {', '.join(missing)}; compare the package's config study/base")


def _check_words(name: str, entries: Any) -> None:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise VLMQError(f"study.{name} must be a list of words, e.g. study.{name}=[a,b]; got {entries!r}")


@dataclass(frozen=True)
class Request:
    """What the app is asked to do with a study; without any of the first four it runs what is missing, and reports.

    Attributes:
        status: say where it stands.
        dry_run: say what it holds and costs.
        report_only: report what is stored.
        compact: pack what is stored, with samples (``True``) or without (``"rows"``).
        retry: try again what failed.
        samples: run again what was packed without its samples.
    """

    status: bool
    dry_run: bool
    report_only: bool
    compact: bool | str
    retry: bool
    samples: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Request:
        """Check the entries of a plain root config. Raises :class:`VLMQError` for what is missing, no word of these, or asked at once."""
        names = list(cls.__dataclass_fields__)
        if missing := [name for name in ("study", "seed", *names) if name not in config]:
            raise VLMQError(f"the root config lacks {', '.join(missing)}; compare the package's configs/sweep.yaml")
        asked = {name: config[name] for name in names}
        for name, value in asked.items():
            if not isinstance(value, bool) and (name, value) != ("compact", "rows"):
                words = "true, false, or rows to leave samples out" if name == "compact" else "true or false"
                raise VLMQError(f"{name} must be {words}; got {value!r}")
        alone = [name for name in names[:4] if asked[name]]
        if len(alone) > 1 or (alone and (asked["retry"] or asked["samples"])):
            wanted = [name for name in names if asked[name]]
            raise VLMQError(f"{' and '.join(wanted)} cannot be done at once; ask for {' or '.join(wanted)}")
        return cls(**asked)
