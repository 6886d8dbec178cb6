"""The grid of a study: which runs it consists of, as LightningCLI argument lists. Nothing here builds a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_vlmq.core.configs import find_config, read_config
from lightning_vlmq.core.errors import VLMQError, first_line, unknown
from lightning_vlmq.core.identity import code_digest, file_digest, library_versions
from lightning_vlmq.core.names import bits_text
from lightning_vlmq.models import known_vlm, split_name, zoo
from lightning_vlmq.models.fetching import cached_commit
from lightning_vlmq.models.weights import shards_of
from lightning_vlmq.quant.methods import find_method
from lightning_vlmq.quant.outliers import MARK
from lightning_vlmq.quant.scheme import FULL_PRECISION, SCOPES, QuantScheme
from lightning_vlmq.study.run.config import Study

log = logging.getLogger(__name__)

NONE_PLANTED = "1"
LOCAL, HUB = "local-dir:", "hf-hub:"
LONGEST_NAME = 120
"""Characters of a run's name at most. A file's may have 150, with the digest behind it and what is filed as part of the run."""
WEIGHTS = ("--model.pretrained", "--model.checkpoint")
"""Arguments whose value may be a file or folder without a ``/``."""
EMBEDDED = "embedded"
"""On the ``vlm`` axis: every embedded model that is there."""


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        vlm: name, with ``@weights`` where it has several.
        scope: ``"vision"``, ``"vision_text"`` or ``"none"``.
        method: method's name.
        bits: e.g. ``"W4A8"``, ``"W32A32"`` for full precision.
        kind: one of :data:`~lightning_vlmq.study.run.config.KINDS`.
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


def every_vlm(entries: Sequence[str]) -> list[str]:
    """The VLMs of an axis, each once: the entries, but for :data:`EMBEDDED` the embedded models that are there."""
    return list(dict.fromkeys(vlm for entry in entries for vlm in (zoo.names() if entry == EMBEDDED else [entry])))


def compose(study: Study, seeds: Sequence[int], config_folder: Path, data: str = "") -> list[Run]:
    """Spell the grid out, in an order of which every beginning is a balanced study.

    Seed by seed; of a seed full precision first, which all else is compared with; then rounds, each of which has every VLM with every
    method once, the methods' bit-widths being spread over the rounds. The scopes of one method stand side by side, for their vision
    towers have much in common. Where ``study.outermost`` names an axis, the runs of a seed are put in that axis's order instead.

    Args:
        study: the study.
        seeds: of the runs.
        config_folder: the folder of the study's configs, where a config of ``study.commands`` is looked for by its name,
            before the package's.
        data: digest of the data that ``study.data`` names, see :func:`~lightning_vlmq.study.run.inputs.data_digest`.

    Raises:
        VLMQError: an axis names something unknown or nothing, a config file is missing, or a template has a
            placeholder that no run fills.
    """
    methods = [name for name in dict.fromkeys(study.axes["method"]) if name != FULL_PRECISION]
    kinds = {FULL_PRECISION: "fp32", **{name: _kind_of(name) for name in methods}}
    names = every_vlm(study.axes["vlm"])
    for vlm in names:
        known_vlm(*split_name(vlm))  # before hours are spent on the others
    for scope in study.axes["scope"]:
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES)
    widths = {bits_text(*parsed): parsed for parsed in map(_parse_bits, study.axes["bits"])}
    factors = dict.fromkeys(study.axes.get("outliers", [NONE_PLANTED]))
    for factor in factors:
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?|stream", factor):
            raise VLMQError(f"outliers '{factor}' is no factor of at least 1, such as 50, and not 'stream'")
    words = [word for name in study.data for word in ("--config", f"data/{name.removeprefix('data/')}")]
    commands = {kind: _locate_configs([*own, *words], config_folder) for kind, own in study.commands.items()}
    vlms = list(itertools.product(names, factors))
    cells = [(vlm, FULL_PRECISION, "W32A32", "none", 32, 32) for vlm in vlms]
    for turn, (place, method) in itertools.product(range(len(widths)), enumerate(methods)):
        bits = list(widths)[(turn + place) % len(widths)]
        scopes = dict.fromkeys(study.axes["scope"])
        cells += [(vlm, method, bits, scope, *widths[bits]) for vlm in vlms for scope in scopes]
    if (axis := study.outermost) is not None:
        spelled = {"vlm": names, "bits": list(widths)}.get(axis, study.axes[axis])
        places = {name: k for k, name in enumerate(dict.fromkeys(spelled))}
        where = {"method": 1, "bits": 2, "scope": 3}
        full, rest = cells[: len(vlms)], cells[len(vlms) :]
        cells = full + sorted(rest, key=lambda cell: places[cell[0][0] if axis == "vlm" else str(cell[where[axis]])])
    environment = {vlm: [*_environment(split_name(vlm)[0]), data] for vlm, _ in vlms}
    contents: dict[str, Any] = {}
    runs = []
    for seed, ((vlm, outliers), method, bits, scope, weight_bits, act_bits) in itertools.product(seeds, cells):
        name, pretrained = split_name(vlm)
        values: dict[str, Any] = {"vlm": name, "pretrained": pretrained or "", "method": method}
        values |= {"scope": scope, "weight_bits": weight_bits, "act_bits": act_bits, "seed": seed}
        values |= {"outliers": outliers}
        called = vlm if outliers == NONE_PLANTED else f"{vlm}{MARK}{outliers}"
        kind = kinds[method]
        runs.append(_run(study, commands[kind], kind, bits, called, values, environment[vlm], contents, config_folder))
    return runs


def say_unpinned(names: Sequence[str]) -> None:
    """Say of which repositories a study names no revision: a run's name tells nothing of their weights."""
    for name in every_vlm(names):
        if name.startswith(HUB) and "@" not in name:
            here = cached_commit(name.removeprefix(HUB))
            log.warning(
                "'%s' names no revision, and a stored run counts whatever the repository holds later; write %s@%s",
                *(name, name, here or "<commit>"),
            )


def _run(
    study: Study,
    command: Sequence[str],
    kind: str,
    bits: str,
    vlm: str,
    values: dict[str, Any],
    environment: Sequence[str],
    contents: dict[str, Any],
    config_folder: Path,
) -> Run:
    groups = ["all", *(["pretrained"] if values["pretrained"] else []), *(["quantized"] if kind != "fp32" else [])]
    groups += ["outliers"] if values["outliers"] != NONE_PLANTED else []
    templates = [template for group in [*groups, "extra"] for template in study.arguments.get(group, ())]
    decisive = [*command, *_locate_configs([_fill(template, values) for template in templates], config_folder)]
    parts = [vlm, values["method"], *([bits, values["scope"]] if kind != "fp32" else []), f"s{values['seed']}"]
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(part)) for part in parts)
    name = name if len(name) <= LONGEST_NAME else name[-LONGEST_NAME:].lstrip("._-")  # the digest tells runs apart
    run_id = f"{name}-{_digest([*decisive, *filter(None, environment)], contents)}"
    places = values | {"study": study.name, "root": study.root, "run_id": run_id, "run_name": name}
    output = [_fill(template, places | {"cache": study.cache}) for template in study.output]
    output += [f"--data.root={study.data_root}"] if study.data else []
    identity = {"vlm": vlm, "scope": values["scope"], "method": values["method"], "bits": bits, "kind": kind}
    return Run(**identity, seed=values["seed"], run_id=run_id, arguments=(*decisive, *output))


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
    """The words with the file of each config's name, which counts by what it says; YAML written out stays as it is."""
    located: list[str] = []
    for word in words:
        option, joined, name = word.partition("=")
        if option == "--config" and joined:
            located.append(option)
        else:
            name = word
        is_name = located[-1:] == ["--config"] and not name.lstrip().startswith("{")
        located.append(str(find_config(name, config_folder)) if is_name else name)
    return located


def _environment(vlm: str) -> list[str]:
    """What decides results beside the arguments: the package's code and data, the libraries, an embedded model's weights."""
    weights = zoo.FOLDER / f"{vlm}.safetensors"
    own = [file_digest(weights)] if weights.is_file() else []
    return [code_digest(), *(f"{name} {version}" for name, version in library_versions().items()), *own]


def _digest(words: Sequence[str], known: dict[str, Any]) -> str:
    """Hash of an argument list in which config files count by what they say, not by where they are, other files by their bytes.

    ``known`` keeps what a word stands for: a grid of thousands of runs reads each file once.
    """
    content = []
    for word in words:
        if word not in known:
            known[word] = _config_content(Path(word)) or _file_content(word) or word
        content.append(known[word])
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[:12]


def _file_content(word: str) -> str | None:
    """Digest of what an argument's value names: a file, with its shards where it is their index, a model's folder."""
    option, _, value = word.partition("=")
    if not option.startswith("--"):
        return None
    if option == "--model.vlm" and value.startswith(LOCAL):
        return f"{word} {_content(Path(value.removeprefix(LOCAL)).expanduser())}"
    path = Path(value)
    if option not in WEIGHTS and "/" not in value and not path.suffix:
        return None
    with suppress(OSError):  # a value that is too long to be a path
        if path.is_file():
            return " ".join([word, *(_content(file) for file in (path, *shards_of(path)))])
        if (path / "quant.json").is_file():
            return f"{word} {_content(path)}"
    return None


def _content(path: Path) -> str:
    """Digest of a file's bytes, or of a folder's files. Raises :class:`VLMQError` where it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise VLMQError(f"'{error.filename or path}' cannot be read ({error.strerror}); check its rights") from error


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
        return expand(yaml.safe_load(read_config(path)))
    except yaml.YAMLError as error:
        raise VLMQError(f"{path} is not valid YAML ({first_line(error)}); repair it") from error
