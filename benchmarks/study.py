"""Evaluation runs per hour: the study engine beside the usual way, each evaluation run alone, on the same slice, one process each.

Alone means: load the model, quantize it, encode the class names and the images of the set (for OOD detection of the id set too), compute
the one metric, as CLIP_benchmark and OpenOOD do. Starting a process and making the data are not counted for it, and it computes
no intervals. The engine's time holds all that its runs do: data, full precision, logit scale tuning, every metric with intervals, filing.

    python benchmarks/study.py --vlm vit_clean --methods minmax gptq --alone 6

Then the unit costs that ``vlmq-study --dry-run`` counts with: bytes of a row and of a sample, seconds of each method in forward passes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from sklearn.metrics import roc_auc_score

from lightning_vlmq import cli, load_vlm
from lightning_vlmq.core.configs import config_folder
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.sets import EvalSet, in_distribution
from lightning_vlmq.metrics import OOD_SCORES, ScoreInputs
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.results.counting import evaluations_in
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.config import Study
from lightning_vlmq.study.run.execute import execute
from lightning_vlmq.study.run.grid import Run, compose
from lightning_vlmq.study.run.inputs import data_of

SCORES = ("mcm", "msp", "maxlogit", "energy", "entropy")  # what both can compute from logits


def slice_of(options: argparse.Namespace, root: Path) -> list[Run]:
    """The runs of a small study of post-training methods."""
    overrides = [
        *("study=embedded", f"study.root={root}", f"study.axes.vlm=[{options.vlm}]", "study.seeds=[0]"),
        *(f"study.axes.method=[{','.join(options.methods)}]", "study.axes.bits=[W4A8]"),
    ]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("sweep", overrides)["study"], resolve=True)
    extra = [word for word in config["arguments"]["extra"] if not word.startswith("--model.scores")]
    config["arguments"]["extra"] = [*extra, f"--model.scores=[{','.join(SCORES)}]", *options.argument]
    return compose(Study.from_config(config), [0], config_folder())


def units(runs: list[Run], store: ResultsStore, n_sets: int, n_pairs: int) -> list[str]:
    """Unit costs as the study's runs had them, a line each; a pass is a forward of the image tower over the caption pairs."""
    ids, full = store.run_ids(), next(run for run in runs if run.kind == "fp32")
    n_rows, n_samples = store.n_rows(ids), sum(len(store.samples(run_id)) for run_id in ids)
    size = {
        kind: sum(path.stat().st_size for path in (store.root / kind).glob("*.parquet"))
        for kind in ("results", "samples")
    }
    forward = store.facts(full.run_id)["forward_seconds"] / store.facts(full.run_id)["forward_images"]
    made = {run.method: store.seconds(run.run_id)[0] / (forward * n_pairs) for run in runs if run.kind == "ptq"}
    return [
        f"{size['results'] / n_rows:.1f} bytes a row, {n_rows / n_sets / len(ids):.0f} rows a set and model",
        f"{size['samples'] / n_samples:.1f} bytes a sample",
        "passes to quantize: " + ", ".join(f"{method} {passes:.1f}" for method, passes in made.items()),
    ]


def engine(runs: list[Run], root: Path) -> tuple[int, float, float]:
    """Evaluation runs, CPU seconds, and the share of the runs' time that is spent in the model."""
    start = time.process_time()
    outcome = execute(runs, ResultsStore(root), cli.main, Console(quiet=True))
    taken = time.process_time() - start
    if outcome.failures:
        raise SystemExit(f"a run failed: {outcome.failures[0][1]}")
    store = ResultsStore(root)
    facts = [store.facts(run.run_id) for run in runs]
    share = sum(f["forward_seconds"] for f in facts) / sum(f["seconds"] for f in facts)
    return evaluations_in(store.rows()), taken, share


@torch.no_grad()
def alone(vlm_name: str, method: str, scope: str, s: EvalSet, score: str, data: object, inside: EvalSet) -> float:
    """One evaluation run by itself: accuracy of a labelled set, AUROC of an OOD set under a score."""
    vlm = load_vlm(vlm_name)
    batches = [{"image": b["image"], "tokens": vlm.tokenize(b["caption"])} for b in data.calibration_batches()]
    quantize(vlm, method, QuantScheme(weight_bits=4, act_bits=8, scope=scope), batches)
    names = list(s.class_names or data.class_names)
    classifier = vlm.class_features(names, list(s.templates or data.templates))

    def logits(images: EvalSet) -> torch.Tensor:
        every = images.images.images.split(400)
        features = torch.cat([vlm.encode_image(batch) for batch in every])
        return vlm.logit_scale() * features @ classifier.T

    if not ROLES[s.role].is_ood:
        return float((logits(s).argmax(-1) == s.images.columns["target"]).double().mean())
    found = [
        OOD_SCORES[score](ScoreInputs(own / vlm.logit_scale(), own)).numpy() for own in (logits(inside), logits(s))
    ]
    return float(roc_auc_score(np.repeat([1, 0], [len(part) for part in found]), np.concatenate(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="vit_clean")
    parser.add_argument("--methods", nargs="+", default=["minmax", "gptq"], help="post-training ones")
    parser.add_argument("--alone", type=int, default=6, help="evaluation runs to do by themselves, drawn evenly")
    parser.add_argument("--argument", action="append", default=[], help="of every run, such as --data.n_shifted=100")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        runs = slice_of(options, root)
        n, seconds, share = engine(runs, root)
        print(f"engine: {n:,} evaluation runs in {seconds:.1f} CPU seconds", flush=True)
        data = data_of(runs[0].arguments)
        data.setup("validate")
        sets, inside = data.eval_sets, in_distribution(data.eval_sets)
        cells = [(s, score) for s in sets for score in (SCORES if ROLES[s.role].is_ood else ("",))]
        chosen = np.random.default_rng(0).permutation(len(cells))[: options.alone]
        start = time.process_time()
        for number, place in enumerate(chosen):
            scope, method = ("vision", "vision_text")[number % 2], options.methods[number // 2 % len(options.methods)]
            alone(options.vlm, method, scope, *cells[place], data, inside)
        each = (time.process_time() - start) / len(chosen)
        images = sum(len(s.images) for s in sets)
        costs = units(runs, ResultsStore(root), len(sets), len(data.pairs))
    print(
        f"{options.vlm}, {', '.join(options.methods)}, W4A8, both scopes: {len(runs)} runs, {len(sets)} sets, {images:,} images"
    )
    print(f"{'':8} {'evaluation runs':>16} {'CPU s':>8} {'an hour':>9}")
    print(f"{'engine':8} {n:>16,} {seconds:>8.1f} {3600 * n / seconds:>9,.0f}")
    print(f"{'alone':8} {len(chosen):>16,} {each * len(chosen):>8.1f} {3600 / each:>9,.0f}")
    print(f"ratio {n / seconds * each:.1f}; {100 * share:.0f} % of the runs' time is spent in the model, on images")
    print(*costs, sep="\n")


if __name__ == "__main__":
    main()
