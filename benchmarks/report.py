"""A report from the store of a large study: seconds, memory and the page's size, and how they grow with the number of runs.

The stores are made up: rows with the numbers, sets and metrics of ``study=embedded`` (every run about 1,250 rows), packed without samples.

    python benchmarks/report.py --runs 1000 2000 4000 8000
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from lightning_vlmq.data.corruptions import CORRUPTIONS
from lightning_vlmq.evaluation.measures import METRICS
from lightning_vlmq.metrics import OOD_SCORES
from lightning_vlmq.quant import METHODS
from lightning_vlmq.results.counting import COUNTED
from lightning_vlmq.results.packing import packing
from lightning_vlmq.results.said import FACTS
from lightning_vlmq.results.schema import CURVE_SCHEMA, ROW_SCHEMA, RunKey
from lightning_vlmq.results.store import ResultsStore

VLMS = [
    f"{family}_{source}" for family in ("vit", "convnext", "siglip", "coca", "align") for source in ("clean", "noisy")
]
BITS = ((8, 8), (6, 8), (4, 8), (3, 8))
SCORES = list(OOD_SCORES)
LABELLED = [name for name in METRICS if not METRICS[name].needs_reference and METRICS[name].of is not None]
SETS = 250  # in the made-up identity, which is then 20 kB
RANKED = ["auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_openood"]


def keys(n: int) -> list[RunKey]:
    """The first ``n`` models of a grid in the order of a study's, full precision first, every second one tuned."""
    methods = [name for name in METHODS if not METHODS[name].is_control][:16]
    found: list[RunKey] = []
    for seed in range(100):
        bare = [RunKey(vlm, vlm.rpartition("_")[2], "none", "fp32", 32, 32, seed) for vlm in VLMS]
        bare += [
            RunKey(vlm, vlm.rpartition("_")[2], scope, method, *bits, seed)
            for bits in BITS
            for method in methods
            for vlm in VLMS
            for scope in ("vision", "vision_text")
        ]
        found += [key for plain in bare for key in (plain, plain.tuned)]
        if len(found) >= n:
            return found[:n]
    raise SystemExit(f"{n} runs are more than the grid has")


def cells() -> pd.DataFrame:
    """What a run has rows of: dataset, role, corruption, severity, score, metric."""
    sets = [("concepts", "id", "", 0), ("novel", "near_ood", "", 0)]
    sets += [(name, "far_ood", "", 0) for name in ("digits", "textures", "pictograms")]
    sets += [(f"{c}_{s}", "corruption", c, s) for c in CORRUPTIONS for s in range(1, 6)]
    sets += [(f"shift{i}", "shift", "", 0) for i in range(8)]
    sets += [(f"backgrounds_{name}", "spurious", "", 0) for name in ("common", "counter")]
    lines = []
    for dataset, role, corruption, severity in sets:
        where = (dataset, role, corruption, severity)
        if role.endswith("ood"):
            lines += [(*where, score, metric) for score in SCORES for metric in RANKED]
        else:
            lines += [(*where, "", metric) for metric in (LABELLED if role == "id" else LABELLED[:6])]
    for role in ("id", "corruption", "shift", "spurious"):
        lines += [("", role, "", 0, "", metric) for metric in LABELLED]
    lines += [("", role, "", 0, "mcm", metric) for role in ("near_ood", "far_ood") for metric in RANKED]
    lines += [("", "spurious", "", 0, "", metric) for metric in ("common", "counter", "rsg", "vuln_add")]
    return pd.DataFrame(lines, columns=["dataset", "role", "corruption", "severity", "score", "metric"])


def fill(root: Path, n: int) -> int:
    """Make a packed store of ``n`` runs; returns its rows. All but the first are packed without lying in files of their own before."""
    store, base, rng = ResultsStore(root), cells(), np.random.default_rng(0)
    deltas = base[base["metric"] != "vuln_add"].assign(metric=lambda own: "delta_" + own["metric"])
    both = pd.concat([base, deltas], ignore_index=True)
    is_full = ~both["metric"].str.startswith("delta_").to_numpy() & (both["metric"] != "vuln_add").to_numpy()
    level = np.where(both["metric"].str.startswith("delta_"), 0.05, rng.uniform(0.3, 0.9, len(both)))
    every = {f"r{number:05d}": key for number, key in enumerate(keys(n))}
    first = pd.DataFrame([both.iloc[0]]).assign(**every["r00000"].columns(), value=0.5, stderr=0.1, n=1000)
    about = {"sets": [{"name": str(k), "digest": "0" * 16, "group": "g", "role": "corruption"} for k in range(SETS)]}
    filed = first.assign(code_version="0.1.0", run_id="r00000"), pd.DataFrame(), pd.DataFrame()
    store.write("r00000", *filed, identity=about)  # what a run says of itself is as long as a real one's
    said = store._read("results", "r00000").schema.metadata
    said[FACTS] = json.dumps(
        {"evaluations": int((both["metric"].isin(COUNTED) & (both["dataset"] != "")).sum())}
    ).encode()
    templates = {
        whole: pa.Table.from_pandas(both if whole else both[is_full], preserve_index=False) for whole in (True, False)
    }
    levels, total = {True: level, False: level[is_full]}, 0

    def part(kind: str, run_id: str) -> pa.Table:
        nonlocal total
        if kind == "curves":
            return CURVE_SCHEMA.empty_table()
        key = every[run_id]
        whole = key.method != "fp32" or key.is_tuned
        table, noise = templates[whole], rng.normal(size=len(levels[whole]))
        total += len(table)
        columns = {name: table[name] for name in table.column_names}
        columns |= {name: pa.repeat(value, len(table)) for name, value in key.columns().items()}
        columns |= {"value": pa.array(levels[whole] + 0.02 * noise), "stderr": pa.array(np.abs(noise) / 50 + 0.002)}
        columns |= {"n": pa.repeat(1000, len(table)), "code_version": pa.repeat("0.1.0", len(table))}
        columns["run_id"] = pa.repeat(run_id, len(table))
        ordered = [columns[field.name].cast(field.type) for field in ROW_SCHEMA]
        return pa.Table.from_arrays(ordered, schema=ROW_SCHEMA.with_metadata(said))

    with packing(store._packs) as packer:
        packer.pack(list(every), part, keeps_samples=False)
    shutil.rmtree(root / "results")
    return total


def report(root: Path) -> None:
    """Report once in this process; prints what it took as JSON. Processor time has no part in what else runs on the machine."""
    from lightning_vlmq.study.report.page import build_report

    start, cpu = time.perf_counter(), time.process_time()
    page = build_report(root)
    taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**taken, "gib": peak, "page_mb": page.stat().st_size / 1e6}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
    parser.add_argument("--folder", type=Path, help="where to keep the stores; a temporary folder if not given")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(options.report)
        return
    print(
        f"{'runs':>6} {'rows':>11} {'store MB':>9} {'made, s':>8} {'report, s':>9} {'CPU s':>7} {'GiB':>5} {'page MB':>8}"
    )
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        for n in options.runs:
            root = (options.folder or Path(temporary)) / f"runs{n}"
            start = time.perf_counter()
            rows = fill(root, n)
            made = time.perf_counter() - start
            size = sum(path.stat().st_size for path in root.rglob("*.parquet")) / 1e6
            command = [sys.executable, __file__, "--report", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            measured.append((n, found["cpu"]))
            if options.folder is None:
                shutil.rmtree(root)  # 30 kB a run; one store at a time
            line = f"{n:>6} {rows:>11,} {size:>9.1f} {made:>8.1f} {found['seconds']:>9.1f} {found['cpu']:>7.1f}"
            print(f"{line} {found['gib']:>5.2f} {found['page_mb']:>8.2f}", flush=True)
    if len(measured) > 1:
        slope, start_up = np.polyfit(*np.array(measured).T, 1)
        print(f"CPU seconds = {start_up:.1f} + {1000 * slope:.2f} for every 1,000 runs")


if __name__ == "__main__":
    main()
