"""Draw the contact sheet of the embedded benchmark.

Usage:
    python scripts/draw_concepts.py docs/images/concepts.jpg
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.data.corruptions import CORRUPTIONS
from lightning_vlmq.data.embedded.concepts import Drawings, class_names, read_drawings
from lightning_vlmq.data.embedded.scenes import SIZE
from lightning_vlmq.data.embedded.sets import HOUSES, scenes

N_CONCEPTS = 12
SEVERITY = 3


def sheet() -> list[tuple[str, Tensor, list[str]]]:
    """The rows: a title, images uint8 ``[n, 3, 64, 64]``, and what stands under each."""
    data = EmbeddedData(
        n_shifted=N_CONCEPTS * 4, n_ood=N_CONCEPTS * 4, corruptions=tuple(CORRUPTIONS), severities=(SEVERITY,)
    )
    data.setup()
    by_name = {s.name: s.images for s in data.eval_sets}
    rows = [*_houses(data), _row("in distribution", by_name["concepts"].images[::160])]
    for name in ("unseen", *HOUSES, *(s.name for s in data.eval_sets if s.role == "shift" and s.group == "renditions")):
        rows.append(_row(name, by_name[name].images))
    rows += [_row(name.replace("_", " "), by_name[name].images) for name in by_name if name.startswith("backgrounds_")]
    rows += [_row(name, by_name[name].images) for name in ("digits", "textures", "pictograms")]
    families = list(CORRUPTIONS)
    worn = torch.stack([by_name[f"{name}_{SEVERITY}"].images[1] for name in families])
    half = (len(families) + 1) // 2
    for part in (slice(0, half), slice(half, None)):
        rows.append((f"severity {SEVERITY}", worn[part], [name.replace("_", " ") for name in families[part]]))
    return rows


def _houses(data: EmbeddedData) -> list[tuple[str, Tensor, list[str]]]:
    """The same concepts by house, as far as the committed drawings hold the cell."""
    parts = [read_drawings(data.recipe.path, part) for part in ("id", "pairs", "house")]
    images = torch.cat([p.images for p in parts])
    concept = torch.cat([p.concept for p in parts])
    house = [h for p in parts for h in p.house]
    count = torch.bincount(concept, minlength=len(class_names()))
    most = count.argsort(descending=True, stable=True)[: N_CONCEPTS * 3 : 3].tolist()
    chosen = sorted(most, key=lambda k: class_names()[k])
    rows = []
    for name in sorted(set(house), key=lambda h: (h in HOUSES.values(), h)):
        canvas, captions = torch.full((len(chosen), 3, SIZE, SIZE), 255, dtype=torch.uint8), []
        for k, wanted in enumerate(chosen):
            cell = next((i for i, h in enumerate(house) if h == name and concept[i] == wanted), None)
            if cell is not None:
                one = Drawings(images[cell : cell + 1], concept[cell : cell + 1], (name,))
                canvas[k] = scenes(one, 1.0, data.recipe.generator(1000 + k))[0][0]
            captions.append(class_names()[wanted] if not rows else "")
        rows.append((name, canvas, captions))
    return rows


def _row(title: str, images: Tensor) -> tuple[str, Tensor, list[str]]:
    return title, images[:: max(len(images) // N_CONCEPTS, 1)][:N_CONCEPTS], []


def draw(rows: Sequence[tuple[str, Tensor, list[str]]], path: Path) -> None:
    """Write the figure: a row each, its title at the left."""
    figure, axes = plt.subplots(len(rows), N_CONCEPTS, figsize=(N_CONCEPTS * 0.9, len(rows) * 0.98), squeeze=False)
    for line, (title, images, captions) in zip(axes, rows):
        for k, axis in enumerate(line):
            axis.axis("off")
            if k < len(images):
                axis.imshow(images[k].permute(1, 2, 0).numpy())
            if k < len(captions):
                axis.set_title(textwrap.fill(captions[k], 15), fontsize=5, pad=2)
        line[0].text(-0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.15, right=0.995, top=0.982, bottom=0.005, wspace=0.06, hspace=0.14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="the image to write")
    draw(sheet(), parser.parse_args().path)


if __name__ == "__main__":
    main()
