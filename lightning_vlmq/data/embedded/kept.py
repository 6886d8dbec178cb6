"""The embedded evaluation sets made once into files that every process maps into its memory, instead of once a process."""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.core.identity import code_digest, digest, file_digest, library_versions
from lightning_vlmq.data.embedded.sets import DATASETS, Recipe, build_sets
from lightning_vlmq.data.images.mapped import locked
from lightning_vlmq.data.sets import EvalSet, TensorImages

log = logging.getLogger(__name__)

_PLAIN = tuple(f.name for f in fields(EvalSet) if f.name not in ("images", "digest"))


@lru_cache(maxsize=64)
def kept_sets(name: str, recipe: Recipe, folder: str) -> list[EvalSet]:
    """The sets of one group, from the file that they were made into, which is made where it is not there or damaged.

    Processes that ask for one at once wait for one. What the file is called says what decides its content: the recipe, the drawings, the
    code and the libraries. Where the folder cannot be written, the sets are made in memory, with a warning.

    Args:
        name: key of :data:`~.sets.DATASETS`.
        recipe: what they are made of.
        folder: where such files are.
    """
    decisive = {"recipe": replace(recipe, path=file_digest(recipe.path)), "code": code_digest()}
    path = Path(folder) / f"{name}-{digest({**decisive, 'libraries': library_versions()})}.safetensors"
    try:
        with locked(path):
            if (found := _read(path)) is None:
                _write(DATASETS[name](recipe), path)  # not build_sets, which would hold them in memory too
                found = _read(path)
    except OSError as error:
        log.warning("'%s' cannot be written (%s): images are made in every process", path, error.strerror or error)
        return build_sets(name, recipe)
    return build_sets(name, recipe) if found is None else found


def _write(sets: list[EvalSet], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    about, seen = [], set[int]()
    for number, s in enumerate(sets):
        assert isinstance(s.images, TensorImages)
        columns = {name: column for name, column in s.images.columns.items() if isinstance(column, Tensor)}
        assert len(columns) == len(s.images.columns)
        tensors |= {f"{number}.{name}": column.clone() for name, column in columns.items()}
        pixels = s.images.images.contiguous()
        tensors[f"{number}.images"] = (
            pixels.clone() if pixels.data_ptr() in seen else pixels
        )  # two sets may show the same
        seen.add(pixels.data_ptr())
        about.append({"digest": s.digest, "columns": list(columns), **{name: getattr(s, name) for name in _PLAIN}})
    with replacing(path) as partial:
        save_file(tensors, partial, {"sets": json.dumps(about)})


def _read(path: Path) -> list[EvalSet] | None:
    """``None`` where the file is not there, or does not hold what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            sets = []
            for number, about in enumerate(json.loads(file.metadata()["sets"])):
                columns = {name: file.get_tensor(f"{number}.{name}") for name in about.pop("columns")}
                wanted, images = about.pop("digest"), TensorImages(file.get_tensor(f"{number}.images"), **columns)
                sets.append(EvalSet(images=images, **{name: _frozen(value) for name, value in about.items()}))
                if sets[-1].digest != wanted:
                    raise ValueError(f"set '{sets[-1].name}' is not what was written")
            return sets
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning(
            "'%s' is damaged (%s) and is made again", path, (str(error) or type(error).__name__).splitlines()[0]
        )
        return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
