"""Write docs/methods.md from the results of the study ``methods_table``.

Usage:
    vlmq-study study=methods_table
    python scripts/make_methods_table.py logs/methods_table docs/methods.md
"""

from __future__ import annotations

import argparse
import html
import inspect
import re
import sys
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from scipy.stats import norm

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.quant.training import QATMethod
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.training import WORTH_HEAD, WORTH_NOTE, training_worth, worth_cells

ORDER = sorted(METHODS, key=lambda name: (METHODS[name].needs_training, name))
METRICS = (
    "top1",
    "ece",
    "agreement",
    "kl",
    "coverage_weights",
    "coverage_macs",
    "held_out_loss_start",
    "held_out_loss",
)
SPREAD = {"top1": ("correct", 100.0), "kl": ("kl", 1000.0)}
"""Where the spread is told: the column of the samples that a metric is the mean of, and what its numbers are multiplied with."""
HEAD = """# The sixteen methods

Each of them on one model of every tower family, {towers} quantized, judged on the in-distribution set. Top-1 accuracy,
expected calibration error (ECE, 15 bins), agreement with full precision and coverage (shares of these towers' matrix weights and
of their multiply-accumulates, MACs, that are quantized) are in percent; ± is a standard error over the {n:,} images. KL is the
divergence of full precision's class probabilities from the quantized model's, in thousandths of a nat: it tells methods apart that leave
nearly all predictions as they are. Loss, of the trained methods, is what they minimise, in thousandths, on caption pairs that they
are not trained on: before training and of the state that is kept. These pairs choose that state, the images behind KL choose nothing.
Seconds are those to quantize (for the trained methods: and to train) by the clock, one thread of a machine of {cores} CPU cores; they count
what else the machine did meanwhile, so that only large ratios say something.

```console
{commands}
.venv/bin/python scripts/make_methods_table.py logs/methods_table docs/methods.md
```

A method is chosen by name, `--model.quant.method smoothquant`, or by its file in `configs/quant`, which holds the name, bits and scope.
Its options, which `vlmq show smoothquant` lists, are set by name, `--model.quant.options.alpha 0.8`, or with the method,
`--model.quant.method 'smoothquant(alpha=0.8)'`.

## What they do

| method | training | what it does |
|---|---|---|
"""
FAR = """
## How far apart they are

The best and the worst of the methods, by top-1 accuracy and by KL, and the difference in standard errors of the paired difference, as
both see the same images. The two are picked for being far apart: the extremes of {methods} methods that do not differ at all would be
about {chance:.1f} of these standard errors apart on average (the mean range of {methods} normal variables is {range:.2f} deviations,
Tippett 1925, and a difference of two has a standard deviation of √2 of them; a correlation common to all pairs changes both alike).
Fewer methods are less far apart by chance.

| model | bits | best by top-1 | worst | points | standard errors | least KL | most | thousandths | standard errors |
|---|---|---|---|---:|---:|---|---|---:|---:|
"""
TOWERS = {"vision": "the image tower", "vision_text": "both towers"}
PAYS = f"\n## What training is worth\n\n{fill(WORTH_NOTE, 140)}\n\n"
STAYS = """
## What stays in float

By default every product of a weight with an activation is quantized: linear layers, convolutions, projections, patch stems. In float stay

- the products of attention, `Q K^T` and `A V`: a few percent of a tower's multiply-accumulates, more the more patches there are (4 %
  of ViT-B/16's). `--model.quant.attention int8` quantizes queries, keys, values and probabilities in 8 bits, whatever the method and the
  bits of the layers, in every module that calls `scaled_dot_product_attention`; their ranges are the smallest and largest calibration
  values. That is all attention here; of models of transformers, ALIGN's text tower and SigLIP 2's pooling write the products out, and are
  refused in one line;
- softmax, normalisations, activation functions, residual additions, biases, and tables that are looked up (embeddings);
- QuaRot's run-time rotations.

Fake quantization rounds to the integers' values and multiplies in float; [converted models](convert.md) multiply integers in linear layers
and convolutions, and still round and multiply in float what `attention: int8` quantizes.

The coverage report tells weights and multiply-accumulates (MACs) apart, by tower and kind of layer; results hold both shares
(`coverage_weights`, `coverage_macs`).
"""


def read_results(root: str | Path) -> pd.DataFrame:
    """One line per run: what it is, :data:`METRICS` (fractions in percent, others in thousandths), standard errors, images, seconds, cores.

    Raises:
        VLMQError: the store is empty, or a run was stored without its duration.
    """
    store = ResultsStore(root)
    rows = store.rows()
    rows = rows[(rows["role"] == "id") & rows["metric"].isin(METRICS) & ~rows["is_tuned"] & (rows["dataset"] != "")]
    if rows.empty:
        raise VLMQError(f"'{root}' holds no results; run first: vlmq-study study=methods_table")
    index = ["run_id", "model", "scope", "method", "weight_bits", "act_bits"]
    wide = rows.pivot(index=index, columns="metric", values=["value", "stderr"])
    table = pd.DataFrame({metric: wide["value"].get(metric) for metric in METRICS}).assign(
        top1_stderr=wide["stderr"]["top1"], ece_stderr=wide["stderr"]["ece"]
    )
    thousandths = ["kl", "held_out_loss_start", "held_out_loss"]
    table = table.astype(float) * [1000 if name in thousandths else 100 for name in table.columns]
    table["n"] = rows[rows["metric"] == "top1"].set_index(index)["n"]
    table = table.reset_index()
    durations = [store.seconds(run_id) for run_id in table["run_id"]]
    return table.assign(seconds=[d for d, _ in durations], cores=[c for _, c in durations])


def page(table: pd.DataFrame, store: ResultsStore) -> str:
    """The Markdown page of what :func:`read_results` gives, and of the samples that the store holds."""
    scopes = sorted({TOWERS[scope] for scope in table["scope"] if scope in TOWERS})
    if len(scopes) > 1:
        raise VLMQError("the store holds runs of both scopes, which one table does not tell apart; take one of them")
    told = [name for name in ORDER if name in set(table["method"])]
    lines = [
        HEAD.format(
            commands="\n".join(commands(table)),
            n=int(table["n"].max()),
            cores=int(table["cores"].max()),
            towers=scopes[0],
        )
    ]
    for name in told:
        lines.append(
            f"| `{name}` | {'yes' if METHODS[name].needs_training else 'no'} | {in_cell(summary(METHODS[name]))} |\n"
        )
    left_out = [f"`{name}`" for name in ORDER if METHODS[name].needs_training and name not in told]
    if left_out:
        lines.append(f"\nAlso there, and not among these runs: {', '.join(left_out)}.\n")
    apart = mean_range(len(told))
    lines += [STAYS, FAR.format(methods=len(told), range=apart, chance=apart / 2**0.5)]
    cells = [(model, bits) for model in table["model"].unique() for bits in bits_of(table[table["model"] == model])]
    for model, (weight_bits, act_bits) in cells:
        own = table[(table["model"] == model) & (table["weight_bits"] == weight_bits) & (table["act_bits"] == act_bits)]
        parts = [part for metric in SPREAD for part in spread(own, metric, store)]
        lines.append(f"| {model} | W{weight_bits}A{act_bits} | {' | '.join(parts)} |\n")
    lines.append(f"{PAYS}| model | bits | {' | '.join(WORTH_HEAD)} |\n|---|---|{'---:|' * len(WORTH_HEAD)}\n")
    for model, (weight_bits, act_bits) in cells:
        own = table[(table["model"] == model) & (table["weight_bits"] == weight_bits) & (table["act_bits"] == act_bits)]
        lines.append(f"| {model} | W{weight_bits}A{act_bits} | {' | '.join(worth(own))} |\n")
    for model in table["model"].unique():
        lines.append(model_section(model, table[table["model"] == model]))
    return "".join(lines)


def commands(table: pd.DataFrame) -> list[str]:
    """The studies behind the runs: the committed one, and those with fewer methods at further bits."""
    made = "OMP_NUM_THREADS=1 .venv/bin/vlmq-study study=methods_table"
    by_bits = {}
    for weight_bits, act_bits in bits_of(table):
        own = table[(table["weight_bits"] == weight_bits) & (table["act_bits"] == act_bits)]
        by_bits[f"W{weight_bits}A{act_bits}"] = [name for name in ORDER if name in set(own["method"])]
    most = max(map(len, by_bits.values()))
    fewer = {bits: names for bits, names in by_bits.items() if len(names) < most}
    told = [
        f"{made} 'study.axes.bits=[{bits}]' 'study.axes.method=[{','.join(names)}]'" for bits, names in fewer.items()
    ]
    return [made, *told]


def mean_range(n: int) -> float:
    """Mean of the largest less the smallest of ``n`` independent normal variables, in standard deviations (Tippett 1925)."""
    x = np.linspace(-9, 9, 4001)
    below = norm.cdf(x)
    return float(np.trapezoid(1 - below**n - (1 - below) ** n, x))


def summary(method: PTQMethod) -> str:
    """The first paragraph of a method's docstring and, of a trained one, what it learns from."""
    text = (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")
    if not isinstance(method, QATMethod):
        return text
    return f"{text} Contrastive distillation{' and the feature loss of CLIP-KD' if method.distillation == 'feature' else ''}."


def in_cell(text: str) -> str:
    """A docstring's summary in a table's cell: code as HTML, where a bar can be written so that it ends no cell and shows no backslash."""

    def coded(match: re.Match[str]) -> str:
        found = html.escape(match[1], quote=False)
        return f"<code>{found.translate({ord(mark): f'&#{ord(mark)};' for mark in '|_*'})}</code>"

    return re.sub("``(.+?)``", coded, text).replace("|", "\\|")


def spread(runs: pd.DataFrame, metric: str, store: ResultsStore) -> list[str]:
    """Cells: best method, worst method, their difference, and that in standard errors of the paired difference.

    Args:
        runs: of one model and one number of bits, as :func:`read_results` has them.
        metric: of :data:`SPREAD`.
        store: holds the samples.
    """
    column, factor = SPREAD[metric]
    order = runs.sort_values([metric, "method"])
    ends = (order.iloc[-1], order.iloc[0]) if metric == "top1" else (order.iloc[0], order.iloc[-1])
    if len(runs) < 2 or runs[metric].isna().any():
        return ["–"] * 4
    first, second = (_samples(store, run["run_id"])[column].astype(float) for run in ends)
    if not first.index.equals(second.index):
        raise VLMQError(
            f"runs '{ends[0]['run_id']}' and '{ends[1]['run_id']}' are of other images; run the study again"
        )
    difference = first - second
    error = difference.std(ddof=1) / len(difference) ** 0.5
    apart = f"{abs(difference.mean()) / error:.1f}" if error > 0 else "–"
    return [f"`{ends[0]['method']}`", f"`{ends[1]['method']}`", f"{factor * abs(difference.mean()):.2f}", apart]


def worth(runs: pd.DataFrame) -> list[str]:
    """Cells of :data:`PAYS`, of one model and one number of bits; a dash where nothing was trained, or the other method is not there."""
    found = training_worth(runs)
    return ["0", *["–"] * (len(WORTH_HEAD) - 1)] if found is None else worth_cells(found)


def _samples(store: ResultsStore, run_id: str) -> pd.DataFrame:
    samples = store.samples(run_id)
    return samples[samples["role"] == "id"].set_index(["dataset", "index"]).sort_index()


def bits_of(runs: pd.DataFrame) -> list[tuple[int, int]]:
    """Bits of weights and activations, from many to few; without full precision."""
    return sorted({(w, a) for w, a in zip(runs["weight_bits"], runs["act_bits"]) if (w, a) != (32, 32)}, reverse=True)


def model_section(model: str, runs: pd.DataFrame) -> str:
    """The tables of one model, one for each number of bits: one line per method."""
    lines = [f"\n## {model}\n\n"]
    for run in runs[runs["method"] == FULL_PRECISION].itertuples():
        lines.append(
            f"Full precision: top-1 {run.top1:.1f} ± {run.top1_stderr:.1f}, ECE {run.ece:.1f} ± {run.ece_stderr:.1f}.\n"
        )
    for weight_bits, act_bits in bits_of(runs):
        own = runs[(runs["weight_bits"] == weight_bits) & (runs["act_bits"] == act_bits)].set_index("method")
        lines.append(f"\n### {model}, W{weight_bits}A{act_bits}\n\n")
        lines.append("| method | top-1 | ± | ECE | agreement | KL | loss | weights | MACs | seconds |\n")
        lines.append(f"|---|{'---:|' * 9}\n")
        for method in (name for name in ORDER if name in own.index):
            run = own.loc[method]
            cells = [f"{run[name]:.1f}" for name in ("top1", "top1_stderr", "ece", "agreement")]
            cells.append("–" if pd.isna(run["kl"]) else f"{run['kl']:.2f}")
            before, after = run["held_out_loss_start"], run["held_out_loss"]
            cells.append("–" if pd.isna(after) else f"{before:.2f} → {after:.2f}")
            cells += [f"{run[name]:.1f}" for name in ("coverage_weights", "coverage_macs", "seconds")]
            lines.append(f"| `{method}` | {' | '.join(cells)} |\n")
    return "".join(lines)


def main() -> None:
    """Command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", help="the study's folder, e.g. logs/methods_table")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    try:
        text = page(read_results(options.root), ResultsStore(options.root))
    except VLMQError as error:
        print(f"make_methods_table: error: {error}", file=sys.stderr)
        sys.exit(2)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(text)
    print(options.page)


if __name__ == "__main__":
    main()
