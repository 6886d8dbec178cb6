"""Render the embedded benchmark's drawings from openly licensed emoji artwork.

Usage, after ``npm install --prefix data/artwork`` of ``scripts/artwork/package.json`` and ``pip install resvg-py``:
    python scripts/render_concepts.py data/artwork/node_modules data/concepts            # the training part alone
    python scripts/render_concepts.py data/artwork/node_modules data/concepts --package  # and the committed files

A *concept* is an emoji of Unicode (no skin tones, flags, or the variants of a person by gender, hair and family); a *house* is a
set of drawings. A cell is one concept as drawn by one house. Every random choice comes from one seed, so a second run draws the
same (only what lies under fully transparent pixels may differ).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

from lightning_vlmq.data.embedded.concepts import DRAWING, FOLDER, TRAINING_DRAWING

COLOUR_HOUSES = (
    "emojione",
    "emojione-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fxemoji",
    "noto",
    "noto-v1",
    "streamline-emojis",
    "twemoji",
)
UNSEEN_HOUSES = ("openmoji", "emojione-monotone", "fluent-emoji-high-contrast")
PICTOGRAMS = "game-icons"
LEFT_OUT_GROUPS = (None, 2, 9)  # regional indicators, components (skin tones, hair), flags
SEED = 0
MIN_HOUSES_TRAINED = 6  # two cells are held out, so at least four are left to train on
MIN_HOUSES_UNSEEN = 4
N_UNSEEN = 160
HELD_OUT_CELLS = 2
N_PAIRS = 1000
N_PICTOGRAMS = 400


@dataclass
class Concept:
    """One class: its Unicode name, keywords and group, and the icon's name in every house that draws it."""

    name: str
    keywords: list[str]
    group: str
    cells: dict[str, str] = field(default_factory=dict)

    def colour_houses(self) -> list[str]:
        """The houses that draw it in colour and may be trained on."""
        return [h for h in COLOUR_HOUSES if h in self.cells]


class House:
    """One ``@iconify-json`` package: icons, what they are called, and which code points they stand for."""

    def __init__(self, modules: Path, name: str) -> None:
        folder = modules / "@iconify-json" / name
        self.name = name
        self.info = json.loads((folder / "info.json").read_text())
        self.version = json.loads((folder / "package.json").read_text())["version"]
        self.set = json.loads((folder / "icons.json").read_text())
        self.chars = {plain(code): icon for code, icon in json.loads((folder / "chars.json").read_text()).items()}

    def names(self) -> list[str]:
        """Icon names, then aliases."""
        return [*self.set["icons"], *self.set.get("aliases", {})]

    def svg(self, name: str) -> str:
        """The SVG document of an icon or alias."""
        alias = self.set.get("aliases", {}).get(name, {})
        icon = self.set["icons"][alias.get("parent", name)]
        width, height = (icon.get(k, self.set.get(k, 16)) for k in ("width", "height"))
        left, top = icon.get("left", 0), icon.get("top", 0)
        body = icon["body"]
        if alias.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
        )


def plain(code: str) -> str:
    """A code point sequence in lower case without the variation selector that asks for colour."""
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


def slug(text: str) -> str:
    """A name as icon sets write it."""
    folded = unicodedata.normalize("NFKD", text.lower().replace("’", "").replace("'", ""))
    return re.sub(r"[^a-z0-9]+", "-", folded.encode("ascii", "ignore").decode()).strip("-")


def read_concepts(modules: Path) -> dict[str, Concept]:
    """Concepts by code point, from emojibase's English data."""
    folder = modules / "emojibase-data" / "en"
    groups = {g["order"]: g["message"] for g in json.loads((folder / "messages.json").read_text())["groups"]}
    concepts = {}
    for entry in json.loads((folder / "data.json").read_text()):
        name, group = entry["label"].replace("’", "'"), entry.get("group")
        code = plain(entry["hexcode"])
        gendered = re.match(r"(man|woman|men|women)\b.", name) or re.search(r"200d-264[02]$", code)
        if group in LEFT_OUT_GROUPS or (group == 1 and (gendered or ":" in name)):
            continue
        name = re.sub(r"[“”\"]", "", name).replace(":", "")
        concepts[code] = Concept(name, entry.get("tags", []), groups[group])
    return concepts


def match(concepts: dict[str, Concept], houses: list[House], modules: Path) -> None:
    """Give every concept its cells: by code point where a house tells them, else by the name of the icon."""
    by_name: dict[str, str] = {}

    def know(name: str, code: str) -> None:
        for key in (slug(name), slug(name).replace("-", "")):
            by_name.setdefault(key, code)

    for code, concept in concepts.items():
        know(concept.name, code)
    for house in houses:
        for code, icon in house.chars.items():
            know(icon, code)
        for alias, to in house.set.get("aliases", {}).items():
            if set(to) == {"parent"} and to["parent"] in by_name:
                know(alias, by_name[to["parent"]])
    for path in sorted((modules / "emojibase-data" / "en" / "shortcodes").glob("*.json")):
        for code, names in json.loads(path.read_text()).items():
            for name in [names] if isinstance(names, str) else names:
                know(name, plain(code))
    for code in concepts:
        if "-" not in code:
            know(unicodedata.name(chr(int(code, 16)), code), code)
    for house in houses:
        for code, icon in house.chars.items():
            if code in concepts:
                concepts[code].cells.setdefault(house.name, icon)
        for icon in house.names():
            code = by_name.get(icon) or by_name.get(icon.replace("-", "")) or by_name.get(re.sub(r"-?\d$", "", icon))
            if code in concepts:
                concepts[code].cells.setdefault(house.name, icon)


def render(house: House, icon: str, size: int) -> bytes | None:
    """An icon as lossless WebP of ``size`` pixels, RGBA; ``None`` where nothing is drawn."""
    png = resvg_py.svg_to_bytes(svg_string=house.svg(icon), width=size, height=size)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    if canvas.getchannel("A").getextrema()[1] < 128:
        return None
    buffer = io.BytesIO()
    canvas.save(buffer, format="WEBP", lossless=True, method=4, quality=100)
    return buffer.getvalue()


def split(concepts: list[Concept], rng: random.Random) -> tuple[list[Concept], list[Concept]]:
    """Trained concepts and those never trained, both in order of name."""
    candidates = sorted((c for c in concepts if len(c.colour_houses()) >= MIN_HOUSES_UNSEEN), key=lambda c: c.name)
    unseen = rng.sample(candidates, N_UNSEEN)
    names = {c.name for c in unseen}
    trained = [c for c in candidates if c.name not in names and len(c.colour_houses()) >= MIN_HOUSES_TRAINED]
    return trained, sorted(unseen, key=lambda c: c.name)


def pictograms(house: House, concepts: list[Concept], rng: random.Random) -> list[str]:
    """Icons none of whose words name a concept."""
    words = {w for c in concepts for w in slug(c.name).split("-")}
    free = [n for n in house.set["icons"] if not words & {p for w in n.split("-") for p in (w, w.removesuffix("s"))}]
    return sorted(rng.sample(free, N_PICTOGRAMS))


class Table:
    """Rows of drawings, written as one Parquet file."""

    def __init__(self, houses: dict[str, House]) -> None:
        self.houses = houses
        self.rows: dict[str, list] = {"part": [], "concept": [], "house": [], "image": []}

    def add(self, part: str, concept: str, house: str, icon: str, size: int) -> None:
        """Render one cell into the table."""
        image = render(self.houses[house], icon, size)
        if image is not None:
            for key, value in zip(self.rows, (part, concept, house, image)):
                self.rows[key].append(value)

    def write(self, path: Path) -> None:
        """Write the file and tell what is in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(self.rows)
        pq.write_table(table, path, compression="zstd", use_dictionary=["part", "concept", "house"])
        sizes = defaultdict(lambda: [0, 0])
        for part, image in zip(self.rows["part"], self.rows["image"]):
            sizes[part][0] += 1
            sizes[part][1] += len(image)
        print(path, path.stat().st_size, dict(sizes))


def main(modules: Path, out: Path, package: bool) -> None:
    """Match, split and render."""
    houses = {name: House(modules, name) for name in (*COLOUR_HOUSES, *UNSEEN_HOUSES, PICTOGRAMS)}
    by_code = read_concepts(modules)
    match(by_code, [h for name, h in houses.items() if name != PICTOGRAMS], modules)
    rng = random.Random(SEED)
    trained, unseen = split(list(by_code.values()), rng)
    held_out = {c.name: sorted(rng.sample(c.colour_houses(), HELD_OUT_CELLS)) for c in trained}
    shown = {c.name: sorted(rng.sample(c.colour_houses(), MIN_HOUSES_UNSEEN)) for c in unseen}
    rest = [(c, h) for c in trained for h in c.colour_houses() if h not in held_out[c.name]]
    pairs = {(c.name, h) for c, h in rng.sample(rest, N_PAIRS)}
    icons = pictograms(houses[PICTOGRAMS], list(by_code.values()), rng)

    training = Table(houses)
    for concept, house in rest:
        training.add("train", concept.name, house, concept.cells[house], TRAINING_DRAWING)
    training.write(out / "train.parquet")
    if not package:
        return
    committed = Table(houses)
    for c in trained:
        for house in held_out[c.name]:
            committed.add("id", c.name, house, c.cells[house], DRAWING)
    for c in unseen:
        for house in shown[c.name]:
            committed.add("unseen", c.name, house, c.cells[house], DRAWING)
    for house in UNSEEN_HOUSES:
        for c in trained:
            if house in c.cells:
                committed.add("house", c.name, house, c.cells[house], DRAWING)
    for icon in icons:
        committed.add("pictogram", icon.replace("-", " "), PICTOGRAMS, icon, DRAWING)
    for c, house in rest:
        if (c.name, house) in pairs:
            committed.add("pairs", c.name, house, c.cells[house], DRAWING)
    committed.write(FOLDER / "drawings.parquet")
    table = [
        {"name": c.name, "keywords": c.keywords, "group": c.group, "trained": c in trained} for c in (*trained, *unseen)
    ]
    lines = ",\n ".join(json.dumps(row, ensure_ascii=False) for row in table)
    (FOLDER / "concepts.json").write_text(f"[\n {lines}\n]\n")
    (FOLDER / "ATTRIBUTION.md").write_text(attribution(houses, modules))


def attribution(houses: dict[str, House], modules: Path) -> str:
    """The file that names every set, its author and its licence."""
    package = json.loads((modules / "emojibase-data" / "package.json").read_text())
    lines = [
        "# Where the drawings and names come from\n",
        "The drawings in `drawings.parquet` are renderings, 48 pixels wide, of the sets below; nothing else about them was",
        "changed. They keep the licences of their sets: those of a CC BY-SA set are under that same licence. The names and",
        "keywords in `concepts.json` are Unicode's (CLDR), by way of emojibase.\n",
        "| set | author | licence | package |",
        "|---|---|---|---|",
    ]
    for h in sorted(houses.values(), key=lambda h: h.name):
        author, licence = h.info["author"], h.info["license"]
        lines.append(
            f"| {h.info['name']} | [{author['name']}]({author['url']}) | [{licence['title']}]({licence['url']}) "
            f"| `@iconify-json/{h.name}` {h.version} |"
        )
    lines.append(
        f"| emojibase (names, keywords, groups) | [{package['author']}](https://github.com/milesj/emojibase) "
        f"| {package['license']}; Unicode data: [Unicode License v3](https://www.unicode.org/license.txt) "
        f"| `emojibase-data` {package['version']} |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", type=Path, help="the node_modules folder")
    parser.add_argument("out", type=Path, help="where the training part goes")
    parser.add_argument("--package", action="store_true", help="write the committed files too")
    options = parser.parse_args()
    if not (options.modules / "emojibase-data").is_dir():
        sys.exit(f"'{options.modules}' lacks emojibase-data; run: make data")
    main(options.modules, options.out, options.package)
