"""Write docs/methods.md from the results of the study ``methods_table``.

Usage:
    vlmq-study study=methods_table
    python scripts/make_methods_table.py logs/methods_table docs/methods.md
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import pandas as pd

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.results.store import ResultsStore

ORDER = sorted(METHODS, key=lambda name: (METHODS[name].needs_training, name))
METRICS = ("top1", "ece", "agreement", "coverage_weights", "coverage_macs", "held_out_loss_start", "held_out_loss")
LOSSES = METRICS[-2:]
HEAD = """# The sixteen methods

Each of them on one model of every tower family, both towers quantized, judged on the in-distribution set. Top-1 accuracy,
expected calibration error (ECE, 15 bins), agreement with full precision and coverage (shares of both towers' matrix weights and
of their multiply-accumulates, MACs, that are quantized) are in percent; ± is a standard error over the {n:,} images, the same for
all methods of a table. Loss is that on caption pairs which are not trained on, in thousandths: before training and after.
Seconds are those to quantize (for the trained methods: and to train) on a machine of {cores} CPU cores, one thread.

```console
OMP_NUM_THREADS=1 .venv/bin/vlmq-study study=methods_table
.venv/bin/python scripts/make_methods_table.py logs/methods_table docs/methods.md
```

A method is chosen by name, `--model.quant.method gptq`, or by its file in `configs/quant`, where its options stand.

## What they do

| method | training | what it does |
|---|---|---|
"""
STAYS = """
## What stays in float

By default every product of a weight with an activation is quantized: linear layers, convolutions, projections, patch stems. In float stay

- the products of attention, `Q K^T` and `A V`: a few percent of a tower's multiply-accumulates, more the more patches there are (4 %
  of ViT-B/16's). `--model.quant.attention int8` quantizes queries, keys, values and probabilities in 8 bits, whichever module
  computes them and whatever the method and the bits of the layers; their ranges are the smallest and largest calibration values;
- softmax, normalisations, activation functions, residual additions, biases, and tables that are looked up (embeddings);
- QuaRot's run-time rotations.

The coverage report tells weights and multiply-accumulates (MACs) apart, by tower and kind of layer; results hold both shares
(`coverage_weights`, `coverage_macs`).
"""


def read_results(root: str | Path) -> pd.DataFrame:
    """One line a run: what it is, :data:`METRICS` in percent, their standard errors, images, seconds and cores.

    Raises:
        VLMQError: the store is empty, or a run was stored without its duration.
    """
    store = ResultsStore(root)
    rows = store.rows()
    rows = rows[(rows["role"] == "id") & rows["metric"].isin(METRICS) & ~rows["is_tuned"]]
    if rows.empty:
        raise VLMQError(f"'{root}' holds no results; run first: vlmq-study study=methods_table")
    index = ["run_id", "model", "method", "weight_bits", "act_bits"]
    wide = rows.pivot(index=index, columns="metric", values=["value", "stderr"]) * 100
    table = pd.DataFrame({metric: wide["value"].get(metric) for metric in METRICS}).assign(
        top1_stderr=wide["stderr"]["top1"], ece_stderr=wide["stderr"]["ece"]
    )
    table["n"] = rows[rows["metric"] == "top1"].set_index(index)["n"]
    table = table.reset_index()
    durations = [store.seconds(run_id) for run_id in table["run_id"]]
    return table.assign(seconds=[d for d, _ in durations], cores=[c for _, c in durations])


def page(table: pd.DataFrame) -> str:
    """The Markdown page of what :func:`read_results` gives."""
    lines = [HEAD.format(n=int(table["n"].max()), cores=int(table["cores"].max()))]
    for name in ORDER:
        summary = (inspect.getdoc(METHODS[name]) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{name}` | {'yes' if METHODS[name].needs_training else 'no'} | {summary} |\n")
    lines.append(STAYS)
    for model in table["model"].unique():
        lines.append(model_section(model, table[table["model"] == model]))
    return "".join(lines)


def model_section(model: str, runs: pd.DataFrame) -> str:
    """The table of one model: a line a method, four columns a bit-width."""
    full = runs[runs["method"] == FULL_PRECISION]
    bits = sorted({(w, a) for w, a in zip(runs["weight_bits"], runs["act_bits"]) if (w, a) != (32, 32)}, reverse=True)
    named = [f"{label} W{w}A{a}" for w, a in bits for label in ("top-1", "ECE", "agreement", "loss", "seconds")]
    lines = [f"\n## {model}\n\n"]
    for run in full.itertuples():
        lines.append(
            f"Full precision: top-1 {run.top1:.1f} ± {run.top1_stderr:.1f}, ECE {run.ece:.1f} ± {run.ece_stderr:.1f}.\n\n"
        )
    lines.append(f"| method | {' | '.join(named)} | weights | MACs |\n|---|{'---:|' * (len(named) + 2)}\n")
    for method in (m for m in ORDER if m in set(runs["method"])):
        own = runs[runs["method"] == method].set_index(["weight_bits", "act_bits"])
        cells = []
        for key in bits:
            if key not in own.index:
                cells += ["–"] * 5
                continue
            run = own.loc[key]
            cells += [f"{run['top1']:.1f}", f"{run['ece']:.1f}", f"{run['agreement']:.1f}"]
            before, after = (10 * run[loss] for loss in LOSSES)  # stored as a number, held here in percent
            cells += ["–" if pd.isna(after) else f"{before:.2f} → {after:.2f}", f"{run['seconds']:.1f}"]
        lines.append(
            f"| `{method}` | {' | '.join(cells)} | {own['coverage_weights'].min():.1f} | {own['coverage_macs'].min():.1f} |\n"
        )
    return "".join(lines)


def main() -> None:
    """Command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", help="the study's folder, e.g. logs/methods_table")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    try:
        text = page(read_results(options.root))
    except VLMQError as error:
        print(f"make_methods_table: error: {error}", file=sys.stderr)
        sys.exit(2)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(text)
    print(options.page)


if __name__ == "__main__":
    main()
