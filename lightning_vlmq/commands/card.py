"""``vlmq card``: a saved quantized model's reliability card, Markdown with the metadata that model hubs read."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_vlmq
from lightning_vlmq.commands import WordParser, command
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.names import bits_text

if TYPE_CHECKING:
    import pandas as pd

    from lightning_vlmq.evaluation.headline import HeadlineLine
    from lightning_vlmq.quant import CoverageReport


@dataclass(frozen=True)
class Saved:
    """What a saved model says of itself.

    Attributes:
        model: its VLM.
        pretrained: the VLM's weights.
        words: the arguments by which ``vlmq`` builds the VLM again.
        method: its method.
        options: the method's options that are not its defaults.
        scheme: how it was quantized.
        coverage: what of it.
    """

    model: str
    pretrained: str
    words: str
    method: str
    options: dict[str, Any]
    scheme: dict[str, Any]
    coverage: CoverageReport

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """Read a folder's description; raises :class:`VLMQError` where it is none."""
        from lightning_vlmq.models.loading import SCHEMAS
        from lightning_vlmq.models.provenance import EMBEDDED
        from lightning_vlmq.quant.checkpoint import DESCRIPTION, FORMAT, read_description
        from lightning_vlmq.quant.description import described
        from lightning_vlmq.quant.outliers import MARK

        found = described(read_description(folder / DESCRIPTION, FORMAT), folder / DESCRIPTION)
        name, _, planted = found.model.partition(MARK)
        source = found.origin.provenance.source
        words = f"--model.vlm {name}" + (
            "" if source == EMBEDDED or name.startswith(SCHEMAS) else f" --model.pretrained {source}"
        )
        words += f" --model.outliers {planted}" if planted else ""
        about = found.method, found.options, asdict(found.scheme), found.coverage
        return cls(found.model, found.pretrained, words, *about)

    @property
    def bits(self) -> str:
        """E.g. ``"W4A8"``."""
        return bits_text(self.scheme["weight_bits"], self.scheme["act_bits"])


_PACKAGES = ("torch", "torchvision", "torchao", "open_clip_torch", "timm", "lightning")


@command("card", "Read results")
def run(args: list[str]) -> None:
    """Write the reliability card of a saved model, from its run beside full precision's."""
    parser = WordParser(
        prog="vlmq card",
        description="Write README.md into a saved model's folder: what was quantized, what it did to every dimension, how to repeat it. "
        "Publishing the folder is up to you.",
    )
    parser.add_argument("checkpoint", help="folder of the saved model (quant.json, model.safetensors)")
    parser.add_argument("full", help="the full-precision run in the store")
    parser.add_argument("run", help="the model's own run in the store")
    parser.add_argument("--root", default="logs/runs", help="the store's folder (default: %(default)s)")
    parser.add_argument("--license", default="other", help="of the weights, as hubs spell it (default: %(default)s)")
    given = parser.parse_args(args)
    path = Path(given.checkpoint) / "README.md"
    text = card(Path(given.checkpoint), given.full, given.run, given.root, given.license)
    from lightning_vlmq.core.atomic import write_text

    write_text(path, text)
    print(path)


def card(checkpoint: Path, full: str, run_id: str, root: str, licence: str = "other") -> str:
    """The card's text.

    Args:
        checkpoint: folder of the saved quantized model.
        full: the run of the same VLM in full precision.
        run_id: the run that judged the model.
        root: the store that holds both.
        licence: of the weights.

    Raises:
        VLMQError: the checkpoint cannot be read, a run is missing, or is of another model, method or scheme than the checkpoint.
    """
    from lightning_vlmq.commands.compare import require_same_samples, samples, settings_of
    from lightning_vlmq.evaluation.headline import headline, side_by_side
    from lightning_vlmq.results.store import ResultsStore

    saved = Saved.read(checkpoint)
    store = ResultsStore(root)
    for name in (full, run_id):
        if name not in store.run_ids():
            raise unknown(f"run of '{root}'", name, store.run_ids())
    stored = store.rows(dict.fromkeys([full, run_id]))
    rows = stored[stored["run_id"] == run_id]
    about, before = (stored[stored["run_id"] == name].iloc[0] for name in (run_id, full))
    said = (about["model"], about["method"], about["weight_bits"], about["act_bits"], about["scope"])
    own = (saved.model, saved.method, *(saved.scheme[name] for name in ("weight_bits", "act_bits", "scope")))
    if said != own:
        raise VLMQError(f"run '{run_id}' judged {said}, the checkpoint is {own}; give the checkpoint's own run")
    if (before["model"], before["method"]) != (saved.model, "fp32"):
        raise VLMQError(f"run '{full}' is {before['model']} {before['method']}, not {saved.model} in full precision")
    loaded = [samples(name, root) for name in (full, run_id)]
    require_same_samples(loaded, [full, run_id])
    lines = headline(side_by_side(loaded), settings_of([full, run_id], root))
    parts = [_metadata(saved, lines, licence), _about(saved), _dimensions(lines), _coverage(saved), _spectra(rows)]
    parts += [_data(rows), _reproduce(saved, about, checkpoint)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(saved: Saved, lines: list[HeadlineLine], licence: str) -> str:
    """The front matter: tags, and results as a hub's model index."""
    import yaml

    metrics = []
    for line in lines:
        measure = line.dimension.measure
        name = f"{line.dimension.title}: {measure.info.title}"
        metrics.append({"type": measure.metric, "name": name, "value": round(line.values[1], 6)})
    entry = {
        "task": {"type": "zero-shot-image-classification"},
        "dataset": {"name": "reliability", "type": "lightning_vlmq"},
        "metrics": metrics,
    }
    name = f"{saved.model}-{saved.method}-{saved.bits}"
    content: dict[str, Any] = {
        "license": licence,
        "library_name": "lightning_vlmq",
        "pipeline_tag": "zero-shot-image-classification",
    }
    content |= {
        "tags": ["quantized", "clip", saved.method],
        "base_model": saved.model,
        "model-index": [{"name": name, "results": [entry]}],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _about(saved: Saved) -> str:
    from lightning_vlmq.models.provenance import RANDOM

    scheme = {
        name: value for name, value in {**saved.scheme, **saved.options}.items() if value not in ((), [], None, "")
    }
    fields = "\n".join(f"| `{name}` | {value} |" for name, value in scheme.items())
    weights = "random weights" if saved.pretrained == RANDOM else saved.pretrained
    return (
        f"# {saved.model} ({weights}), {saved.method} {saved.bits}\n\n"
        f"A quantized vision-language model, judged on every reliability dimension beside its full precision by lightning_vlmq "
        f"{lightning_vlmq.__version__}. Numbers are evaluated with floats on the integer grid.\n\n| scheme | |\n|---|---|\n{fields}"
    )


def _dimensions(lines: list[HeadlineLine]) -> str:
    head = "| dimension | measure, % | full precision | quantized | change, points | 95 % interval | |\n|---|---|---:|---:|---:|---:|---|"
    body = []
    for line in lines:
        low, high = 100 * (line.change - line.half_width), 100 * (line.change + line.half_width)
        verdict = ("better" if line.is_better else "worse") if line.is_significant else "not significant"
        values = " | ".join(f"{100 * value:.2f}" for value in line.values)
        measure = line.dimension.measure
        what = measure.info.title + (f" ({measure.score})" if measure.score else "")
        body.append(
            f"| {line.dimension.title} | {what} | {values} | {100 * line.change:+.2f} | {low:+.2f} to {high:+.2f} | {verdict} |"
        )
    note = "Paired bootstrap over test images; significance at a false discovery rate of 5 % over this table."
    return "## Reliability\n\n" + "\n".join([head, *body]) + f"\n\n{note}"


def _coverage(saved: Saved) -> str:
    rows = []
    for r in saved.coverage.rows:
        counts = (r.weights, r.weights_quantized, r.macs, r.macs_quantized)
        rows.append(
            " | ".join([f"| {r.tower}", r.layer_type.replace("_", " "), *(f"{count:,}" for count in counts)]) + " |"
        )
    head = "| tower | layers | weights | quantized | MACs | quantized |\n|---|---|---:|---:|---:|---:|"
    left = ", ".join(f"`{name}`" for name in saved.coverage.unquantized)
    summary = "\n\n".join(saved.coverage.lines())
    kept = (
        f"Matrix weights that stayed in float: {left}." if left else "No matrix weight of either tower stayed in float."
    )
    return "## What was quantized\n\n" + summary + "\n\n" + "\n".join([head, *rows]) + f"\n\n{kept}"


def _spectra(rows: pd.DataFrame) -> str:
    wanted = rows[rows["metric"].isin(["stable_rank", "effective_rank", "top_energy"])]
    if wanted.empty:
        return ""
    table = wanted.pivot_table(index="score", columns="metric", values="value", sort=False)
    lines = []
    for group, values in zip(table.index, table.to_numpy()):
        lines.append(f"| {group} | {' | '.join(f'{value:.3g}' for value in values)} |")
    head = f"| layers | {' | '.join(name.replace('_', ' ') for name in table.columns)} |\n|---|{'---:|' * len(table.columns)}"
    return "## Spectra of the weights\n\n" + "\n".join([head, *lines])


def _data(rows: pd.DataFrame) -> str:
    sets = rows[rows["n"] > 0].groupby(["role", "dataset"], sort=False)["n"].max().reset_index()
    corrupted = sets["role"] == "corruption"
    lines = [f"| {role} | {name} | {n:,} |" for role, name, n in sets[~corrupted].itertuples(index=False)]
    if corrupted.any():
        lines.append(f"| corruption | {corrupted.sum()} sets | {sets[corrupted]['n'].max():,} each |")
    return "## Data\n\n| role | data set | images |\n|---|---|---:|\n" + "\n".join(lines)


def _reproduce(saved: Saved, about: Any, checkpoint: Path) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    words = f"{saved.words} --model.checkpoint {checkpoint.as_posix()} --seed_everything {about['seed']}"
    return (
        f"## Again\n\n```console\nvlmq test --config eval {words}\n```\n\n"
        f"Judged by version {about['code_version']}; card by Python {platform.python_version()}, {versions}."
    )
