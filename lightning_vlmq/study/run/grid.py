"""The grid of a study: which runs it consists of, as LightningCLI argument lists. Nothing here builds a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_vlmq.core.configs import find_config
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import code_digest, file_digest, library_versions
from lightning_vlmq.models import known_vlm, split_name, zoo
from lightning_vlmq.quant.methods import find_method
from lightning_vlmq.quant.scheme import FULL_PRECISION, SCOPES, QuantScheme

KINDS = ("fp32", "ptq", "qat")
"""Kinds of runs: full precision, post-training quantization, quantization-aware training. Each has its command."""

AXES = ("vlm", "method", "bits", "scope")
"""The axes that every study has."""

NONE_PLANTED = "1"


@dataclass(frozen=True)
class Study:
    """A study's config, as ``configs/study/*.yaml`` spells it.

    Attributes:
        name: the study's folder below ``logs/``.
        root: that folder; results, TensorBoard logs, failures and the report go there.
        axes: ``vlm``, ``method``, ``bits`` and ``scope``, each a list of names, and where planted outlier channels are studied
            ``outliers``, their factors (1: none); the grid is their product.
        commands: by kind (:data:`KINDS`), the start of the argument list: subcommand and config files.
        arguments: templates of the arguments that decide the result: under ``all`` for every run, under ``pretrained``
            for VLMs written ``name@weights``, under ``outliers`` where they are planted, under ``quantized`` for all but full
            precision, and under ``extra``
            whatever the user adds to every run.
        output: templates of the arguments that only say where things go; they do not count for what a run is.
        data: names of data configs, ``data/imagenet`` without the ``data/``, which every run is evaluated on together; none for the
            commands' own.
        data_root: the folder that their files are below; where it is does not count for what a run is, what is in it does.
        outermost: axis that changes last, ``vlm`` by default: with ``bits``, every VLM is through at the first width before any
            run at the second, so that a study that is stopped has compared all VLMs.
    """

    name: str
    root: str
    axes: Mapping[str, Sequence[str]]
    commands: Mapping[str, Sequence[str]]
    arguments: Mapping[str, Sequence[str]]
    output: Sequence[str]
    data: Sequence[str] = ()
    data_root: str | None = None
    outermost: str = "vlm"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Study:
        """Check a plain (resolved) config. Raises :class:`VLMQError` for what is missing or unknown."""
        names = list(cls.__dataclass_fields__)
        for name in config:
            if name not in names:
                raise unknown("entry of the study config", str(name), names)
        if missing := [name for name in names if name not in config and name not in ("data", "data_root", "outermost")]:
            raise VLMQError(f"the study config lacks {', '.join(missing)}; compare the package's config study/base")
        planted = [axis for axis in ("outliers",) if axis in (config["axes"] or ())]
        tables = {"axes": (*AXES, *planted), "commands": KINDS, "arguments": None}
        for table, keys in tables.items():
            _check_table(table, config[table], keys)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", str(config["name"])):
            raise VLMQError(f"study.name '{config['name']}' is no folder name; use letters, digits, '.', '_' and '-'")
        data = config.get("data") or []
        if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
            raise VLMQError(f"study.data must be a list of data configs, e.g. study.data=[imagenet,cc3m]; got {data!r}")
        if data and not config.get("data_root"):
            raise VLMQError("study.data names data sets in files: say where they lie, study.data_root=/datasets")
        if (outermost := config.get("outermost", "vlm")) not in AXES:
            raise unknown("axis for study.outermost", str(outermost), AXES)
        if config.get("data_root") and not data:
            raise VLMQError("study.data_root is given, but no data: add study.data=[imagenet,cc3m]")
        return cls(**config)


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        vlm: name, with ``@weights`` where it has several.
        scope: ``"vision"``, ``"vision_text"`` or ``"none"``.
        method: method's name.
        bits: e.g. ``"W4A8"``, ``"W32A32"`` for full precision.
        kind: one of :data:`KINDS`.
        seed: of everything random in the run.
        run_id: the name of its files in the results store, made of what it is and a digest of what decides its result.
        arguments: what ``vlmq`` is called with.
    """

    vlm: str
    scope: str
    method: str
    bits: str
    kind: str
    seed: int
    run_id: str = field(compare=False)
    arguments: tuple[str, ...] = field(compare=False, repr=False)

    @property
    def label(self) -> str:
        """The run in words, e.g. ``"vit_clean minmax W4A8 vision"``."""
        parts = [self.vlm, self.method] + ([] if self.kind == "fp32" else [self.bits, self.scope])
        return " ".join(parts) + (f" seed {self.seed}" if self.seed else "")


def compose(study: Study, seed: int, config_folder: Path) -> list[Run]:
    """Spell the grid out, each VLM's full precision first: it is what all others of that VLM are compared with.

    Args:
        study: the study.
        seed: seed of every run.
        config_folder: the folder of the study's configs, where a config of ``study.commands`` is looked for by its name,
            before the package's.

    Raises:
        VLMQError: an axis names something unknown or nothing, a config file is missing, or a template has a
            placeholder that no run fills.
    """
    methods = [name for name in study.axes["method"] if name != FULL_PRECISION]
    kinds = {name: _kind_of(name) for name in methods}
    for vlm in study.axes["vlm"]:
        known_vlm(*split_name(vlm))  # before hours are spent on the others
    for scope in study.axes["scope"]:
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES)
    widths = {bits: _parse_bits(bits) for bits in study.axes["bits"]}
    data = [word for name in study.data for word in ("--config", f"data/{name.removeprefix('data/')}")]
    commands = {kind: _locate_configs([*words, *data], config_folder) for kind, words in study.commands.items()}
    runs = []
    factors = dict.fromkeys(study.axes.get("outliers", [NONE_PLANTED]))
    for factor in factors:
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?|stream", factor):
            raise VLMQError(f"outliers '{factor}' is no factor of at least 1, such as 50, and not 'stream'")
    for vlm, outliers in itertools.product(dict.fromkeys(study.axes["vlm"]), factors):
        cells = [(FULL_PRECISION, "W32A32", "none", 32, 32)]
        cells += [
            (method, bits, scope, *widths[bits])
            for method in dict.fromkeys(methods)
            for bits in widths
            for scope in dict.fromkeys(study.axes["scope"])
        ]
        for method, bits, scope, weight_bits, act_bits in cells:
            kind = "fp32" if method == FULL_PRECISION else kinds[method]
            name, pretrained = split_name(vlm)
            values: dict[str, Any] = {"vlm": name, "pretrained": pretrained or "", "method": method}
            values |= {"scope": scope, "weight_bits": weight_bits, "act_bits": act_bits, "seed": seed}
            values |= {"outliers": outliers}
            called = vlm if outliers == NONE_PLANTED else f"{vlm}+outliers{outliers}"
            runs.append(_run(study, commands[kind], kind, bits, called, values))
    if study.outermost == "vlm":
        return runs
    place = {name: k for k, name in enumerate(study.axes[study.outermost])}  # of full precision: with the first
    return sorted(runs, key=lambda run: place.get(getattr(run, study.outermost), 0))


def _run(study: Study, command: Sequence[str], kind: str, bits: str, vlm: str, values: dict[str, Any]) -> Run:
    groups = ["all", *(["pretrained"] if values["pretrained"] else []), *(["quantized"] if kind != "fp32" else [])]
    groups += ["outliers"] if values["outliers"] != NONE_PLANTED else []
    templates = [template for group in [*groups, "extra"] for template in study.arguments.get(group, ())]
    decisive = [*command, *(_fill(template, values) for template in templates)]
    parts = [vlm, values["method"], *([bits, values["scope"]] if kind != "fp32" else []), f"s{values['seed']}"]
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(part)) for part in parts)
    run_id = f"{name}-{_digest([*decisive, *_environment(values['vlm'])])}"
    places = values | {"study": study.name, "root": study.root, "run_id": run_id, "run_name": name}
    output = [_fill(template, places) for template in study.output]
    output += [f"--data.root={study.data_root}"] if study.data else []
    identity = {"vlm": vlm, "scope": values["scope"], "method": values["method"], "bits": bits, "kind": kind}
    return Run(**identity, seed=values["seed"], run_id=run_id, arguments=(*decisive, *output))


def _check_table(name: str, table: Any, keys: Sequence[str] | None) -> None:
    if not isinstance(table, Mapping):
        raise VLMQError(f"study.{name} must be a table; compare the package's config study/base")
    for key, entries in table.items():
        if keys is not None and key not in keys:
            raise unknown(f"entry of study.{name}", str(key), keys)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise VLMQError(
                f"study.{name}.{key} must be a list of words, e.g. study.{name}.{key}=[a,b]; got {entries!r}"
            )
        if not entries and keys is not None:
            raise VLMQError(f"study.{name}.{key} is empty; give it at least one entry")
    if keys is not None and (missing := [key for key in keys if key not in table]):
        raise VLMQError(f"study.{name} lacks {', '.join(missing)}; compare the package's config study/base")


def _kind_of(method: str) -> str:
    return "qat" if find_method(method).needs_training else "ptq"


def _parse_bits(bits: str) -> tuple[int, int]:
    found = re.fullmatch(r"W(\d+)A(\d+)", bits, re.IGNORECASE)
    if not found:
        raise VLMQError(f"bits '{bits}' are not of the form W4A8 (bits per weight, bits per activation)")
    weight_bits, act_bits = int(found[1]), int(found[2])
    QuantScheme(weight_bits=weight_bits, act_bits=act_bits)  # says which widths exist
    return weight_bits, act_bits


def _fill(template: str, values: Mapping[str, Any]) -> str:
    try:
        return template.format_map(values)
    except KeyError as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise VLMQError(f"'{template}' asks for {{{error.args[0]}}}, which no run has; known here: {known}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise VLMQError(f"'{template}' is no template ({error}); write {{{{ and }}}} for literal braces") from None


def _locate_configs(words: Sequence[str], config_folder: Path) -> list[str]:
    located = list(words)
    for position, word in enumerate(words[:-1]):
        if word == "--config":
            located[position + 1] = str(find_config(words[position + 1], config_folder))
    return located


def _environment(vlm: str) -> list[str]:
    """What decides results beside the arguments: the package's code and data, the libraries, an embedded model's weights."""
    weights = zoo.FOLDER / f"{vlm}.safetensors"
    own = [file_digest(weights)] if vlm in zoo.names() and weights.is_file() else []
    return [code_digest(), *(f"{name} {version}" for name, version in library_versions().items()), *own]


def _digest(words: Sequence[str]) -> str:
    """Hash of an argument list in which config files count by what they say, not by where they are, other files by their bytes."""
    content = [_config_content(Path(word)) or _file_content(word) or word for word in words]
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[:12]


def _file_content(word: str) -> str | None:
    """Digest of the file that an argument's value names; of a folder's files, where it is a saved model's."""
    value = word.partition("=")[2]
    if not word.startswith("--") or "/" not in value:
        return None
    path = Path(value)
    with suppress(OSError):
        if path.is_file():
            return f"{word} {file_digest(path)}"
        if (path / "quant.json").is_file():
            return f"{word} {file_digest(path)}"
    return None


def _config_content(path: Path) -> Any:
    """A YAML file's parsed content, without comments, with the config files it names; ``None`` for other words."""
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None

    def expand(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: expand(value) for key, value in node.items()}
        if isinstance(node, list):
            return [expand(value) for value in node]
        if isinstance(node, str):
            for nested in (path.parent / node, Path(node)):
                if nested != path and (content := _config_content(nested)) is not None:
                    return content
        return node

    try:
        return expand(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise VLMQError(f"{path} is not valid YAML ({str(error).splitlines()[0]}); repair it") from error
