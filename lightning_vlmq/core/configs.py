"""The configs that come with the package: where they lie, and how a name finds one.

The folder ``configs`` of the repository travels in the wheel as ``lightning_vlmq/configs``; there is one copy at a time.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError

_PACKAGE = Path(__file__).resolve().parents[1]
_SUFFIXES = (".yaml", ".yml")


def config_folder() -> Path:
    """The folder of the package's configs: inside the package where it was installed, else the repository's.

    Raises:
        VLMQError: neither is there.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "eval.yaml").is_file():
            return folder
    raise VLMQError(f"the package at {_PACKAGE} has lost its configs; install lightning_vlmq again")


def config_names(group: str = "") -> list[str]:
    """Names of the package's configs, such as ``eval`` and ``quant/gptq``, sorted; of one group, or of all."""
    folder = config_folder()
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in (folder / group).rglob("*.yaml"))
    return sorted(found)


def find_config(name: str, first: Path | None = None) -> Path:
    """The file that a name stands for: a path that exists, else one of the package's configs.

    Args:
        name: a path, or a name as :func:`config_names` gives it; a leading ``configs/`` and a suffix do not matter.
        first: a folder of configs in which the name is looked for before the package's.

    Raises:
        VLMQError: it is neither; the nearest names are given.
    """
    if Path(name).is_file():
        return Path(name)
    plain = name.removeprefix("configs/")
    for suffix in _SUFFIXES:
        plain = plain.removesuffix(suffix)
    if first is not None and (first / f"{plain}.yaml").is_file():
        return first / f"{plain}.yaml"
    names = config_names()
    if plain in names:
        return config_folder() / f"{plain}.yaml"
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    near += [known for known in names if known.rsplit("/")[-1] == plain and known not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "vlmq list configs names those of the package"
    raise VLMQError(f"config '{name}' is neither a file nor a config of the package; {hint}")


def read_config(path: Path) -> str:
    """A config file's text, UTF-8 with or without a byte order mark.

    Raises:
        VLMQError: another encoding, with file and line.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise VLMQError(f"line {line} of '{path}' is not in UTF-8; save the file as UTF-8") from error


def config_summary(path: Path) -> str:
    """What a config is for: its first line, a comment. Empty where it has none."""
    with open(path, encoding="utf-8") as text:
        first = text.readline()
    return first.lstrip("# ").strip().rstrip(":") if first.startswith("#") else ""


def _readable(name: str) -> Path:
    path = find_config(name)
    read_config(path)
    return path


def with_config_files(args: list[str]) -> list[str]:
    """A command line in which every ``--config`` (``-c``) names a file. YAML written out after the option stays as it is.

    Raises:
        VLMQError: as :func:`find_config` and :func:`read_config`.
    """
    found = list(args)
    for position, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        if equals and "\n" not in value and not value.lstrip().startswith("{"):
            found[position] = f"{option}={_readable(value)}"
        elif not equals and position + 1 < len(args) and not args[position + 1].lstrip().startswith("{"):
            found[position + 1] = str(_readable(args[position + 1]))
    return found
