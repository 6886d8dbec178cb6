"""Write strengths.csv: how strongly an independent implementation corrupts, for every family, severity and size. Run by hand.

In an environment of its own (no part of this package is needed)::

    pip install imagecorruptions-imaug==1.1.5 corrupt-tta==0.1.7
    python tests/data/corruptions/freeze_strengths.py

``imagecorruptions-imaug`` stands for all families but ``elastic_transform``, which it defines in its own way: that one is
``corrupt-tta``'s. Both know only ImageNet-C's constants; each function's table is replaced by the published constants of the size, so that
the code is theirs.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from cases.corruptions import DRAWS, ELASTIC_PIXELS, IMAGES, PUBLISHED, VARIED, changes, smooth_pixels


class _ConstantFromOutside(ast.NodeTransformer):
    """``c = [...][severity - 1]`` becomes ``c = CONSTANT``."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "c" and isinstance(node.value, ast.Subscript):
            node.value = ast.Name("CONSTANT", ast.Load())
        return node


def implementation(package: str) -> types.ModuleType:
    spec = importlib.util.find_spec(f"{package}.corruptions")
    assert spec is not None and spec.origin is not None
    module = types.ModuleType(f"{package}.corruptions")
    module.__package__ = package
    tree = _ConstantFromOutside().visit(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    exec(compile(ast.fix_missing_locations(tree), spec.origin, "exec"), module.__dict__)
    return module


def constant(name: str, side: int, severity: int) -> Any:
    column = 0 if side == 224 else 1
    found = (ELASTIC_PIXELS if name == "elastic_transform" else PUBLISHED[name])[column][severity - 1]
    if name == "zoom_blur":
        return np.arange(1, *found)
    if name == "spatter":
        return (*found[:-1], int(found[-1] == "mud"))
    return found


def main() -> None:
    general, elastic = implementation("imagecorruptions"), implementation("corrupt_tta")
    rows: list[list[object]] = []
    for side, count in IMAGES.items():
        pixels = smooth_pixels(count, side, side, seed=side)
        for name in sorted([*PUBLISHED, "elastic_transform"]):
            module = elastic if name == "elastic_transform" else general
            for severity in range(1, 6):
                module.__dict__["CONSTANT"] = constant(name, side, severity)
                found = []
                for draw in range(8 * DRAWS if name in VARIED else DRAWS):
                    np.random.seed(draw)
                    corrupted = [np.array(module.__dict__[name](_picture(image), severity)) for image in pixels]
                    found.append(changes(pixels, np.stack(corrupted).transpose(0, 3, 1, 2)))
                values = np.stack(found)  # [draws, images, quantities]
                mean, noise = values.mean((0, 1)), values.std(0, ddof=1).mean(0)
                rows.append([name, severity, side, *(f"{x:.4f}" for pair in zip(mean, noise) for x in pair)])
                print(*rows[-1])
    with Path(__file__).with_name("strengths.csv").open("w", newline="", encoding="utf-8") as file:
        heading = [f"{name}{kind}" for name in ("shift", "strength", "share") for kind in ("", "_noise")]
        csv.writer(file, lineterminator="\n").writerows([["corruption", "severity", "side", *heading], *rows])


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0))


if __name__ == "__main__":
    main()
