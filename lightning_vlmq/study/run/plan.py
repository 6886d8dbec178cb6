"""What a study holds and what it will cost, said before anything starts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.filedata import FileData
from lightning_vlmq.data.images import Preprocess
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.metrics import ood_score
from lightning_vlmq.quant.methods import find_method
from lightning_vlmq.quant.ptq.matched_noise import MatchedNoise
from lightning_vlmq.results.counting import evaluations_a_model
from lightning_vlmq.study.run.costs import Costs
from lightning_vlmq.study.run.grid import Run
from lightning_vlmq.study.run.inputs import data_of, model_setting, n_surgeries, sets_of, setting

PASSES: Mapping[str, float] = {"minmax": 1.22, "smoothquant": 1.17, "awq": 7.5, "gptq": 2.95}
"""Seconds to quantize, in forward passes over the calibration pairs: those that docs/benchmarks.md has of ViT-B-32, printed by
``benchmarks/quantize.py`` and, for the pass, ``benchmarks/fake_quant.py``; ``tests/study/run/test_unit_costs.py`` holds them together."""
TYPICAL = 3.2
"""Of methods that were not measured there: the mean of those that were."""
MATCHED_NOISE = 22.1
"""The same of the control ``matched_noise``, which is adjusted in up to 16 passes; CPU seconds of one thread, measured once by hand for
``vit_clean``, both towers at W4A8, 128 pairs, pattern min-max. What another pattern takes beyond min-max comes on top."""
FAKE_QUANTIZED = 1.13
"""A forward pass with fake quantization in passes without, by ``benchmarks/fake_quant.py`` (1.0 to 1.3)."""
STEP = 2.9
"""A training step in forward passes of its batch (forward and backward), by the same."""
SAMPLE_BYTES, ROW_BYTES = 27.2, 74.4
"""On disk for each image of each model, and for each row of results with what its run says of itself, in files as runs write them, by
``benchmarks/study.py``; packed (``compact=true``), a row takes a fifth."""
ROWS_A_SET = 35
"""Rows for each set of a model, metrics and their changes, by the same."""


@dataclass(frozen=True)
class Plan:
    """What a study holds.

    Attributes:
        runs: the grid.
        images: number of images, by role.
        n_sets: number of evaluation sets.
        n_pairs: number of caption pairs.
        evaluations_a_model: see :func:`~lightning_vlmq.results.counting.evaluations_a_model`.
        models_a_run: 2 where every run is judged with its logit scale tuned too.
        epochs: over the pairs, of methods that train.
        n_scored: number of images that OOD scores are recorded of.
        has_patches: whether one of them compares patches, which takes another forward pass of these images.
        decoded_gb: room for images that are decoded once, ``--data.decoded_gb``; 0 where they are not kept.
        surgeries: models that are made of each quantized one that is no control, with part of its error healed or hurt.
    """

    runs: Sequence[Run] = field(repr=False)
    images: Mapping[str, int]
    n_sets: int
    n_pairs: int
    evaluations_a_model: int
    models_a_run: int
    epochs: int
    n_scored: int
    has_patches: bool
    decoded_gb: float = 0.0
    surgeries: int = 0

    @property
    def models(self) -> int:
        """Models that are judged: full precision, quantized and tuned ones, and those of surgeries."""
        operated = sum(run.kind != "fp32" and not find_method(run.method).is_control for run in self.runs)
        return len(self.runs) * self.models_a_run + operated * self.surgeries

    @property
    def evaluations(self) -> int:
        """Evaluation runs: models times data-set configurations times scores."""
        return self.models * self.evaluations_a_model

    def bytes_on_disk(self, costs: Costs, cache: str) -> dict[str, float]:
        """Bytes of the store, by what they are for."""
        n = sum(self.images.values())
        decoded = self._decoded(costs) * n * _pixels(costs)
        features = {
            vlm: 4.0 * cost.width * (n + self.n_pairs + cost.patches * self.n_scored) for vlm, cost in costs.items()
        }
        towers = {
            (run.vlm, run.method, run.bits, run.seed, run.scope if run.kind == "qat" else "") for run in self.runs
        }
        kept = {"all": [vlm for vlm, *_ in towers], "reference": list(features), "none": []}[cache]
        return {
            "results": ROW_BYTES * ROWS_A_SET * self.n_sets * self.models,
            "samples": SAMPLE_BYTES * n * self.models,
            "features": sum(features[vlm] for vlm in kept),
            **({"decoded images": decoded} if decoded else {}),
        }

    def _decoded(self, costs: Costs) -> float:
        """Share of the images that are decoded once for all VLMs that want them framed alike."""
        wanted = sum(self.images.values()) * _pixels(costs)
        return min(1.0, 1e9 * self.decoded_gb / wanted) if wanted else 0.0

    def seconds(self, costs: Costs, cache: str) -> dict[str, float]:
        """Seconds of one process, by what they are for; statistics are not in it."""
        n, kept = sum(self.images.values()), self._decoded(costs)
        towers = {(run.vlm, run.method, run.bits, run.seed) for run in self.runs if run.scope == "vision"}
        passes_of_images = n + self.n_scored * self.has_patches
        found: defaultdict[str, float] = defaultdict(float)
        framed: set[Preprocess] = set()
        for run in self.runs:
            cost = costs[run.vlm]
            forward = cost.forward
            if cost.preprocess is not None:
                is_first = cost.preprocess not in framed  # to want them so: what is kept is decoded for it alone
                times = (1 - kept) + kept * is_first
                framed.add(cost.preprocess)
                found["decoding"] += cost.decode * (n * times + self.n_pairs)
            if run.kind == "fp32":
                found["full precision"] += forward * passes_of_images
                continue
            is_known = (
                run.scope == "vision_text" and (run.vlm, run.method, run.bits, run.seed) in towers
            )  # by the other scope
            shares_tower = run.kind == "ptq" and is_known and cache != "none"
            found["quantized models"] += 0.0 if shares_tower else forward * FAKE_QUANTIZED * passes_of_images
            found["full precision"] += forward * passes_of_images if cache == "none" else 0.0
            method = find_method(run.method)  # an axis may name one with options
            passes = PASSES.get(method.name, TYPICAL)
            if isinstance(method, MatchedNoise):
                passes = MATCHED_NOISE + PASSES.get(method.pattern, TYPICAL) - PASSES["minmax"]
            if method.needs_training:
                passes = PASSES["gptq"] + 1 + STEP * FAKE_QUANTIZED * self.epochs
            found["quantizing and training"] += passes * forward * self.n_pairs
        return dict(found)


def plan(runs: Sequence[Run], writes: bool = True) -> tuple[Plan, list[EvalSet]]:
    """What a grid holds: its data sets are listed (embedded ones made), no model is loaded.

    Args:
        runs: the grid, or a part of it.
        writes: whether embedded sets are kept where the runs look for them.

    Raises:
        VLMQError: the grid is empty, or data are missing or damaged.
    """
    if not runs:
        raise VLMQError("there is nothing to run: the shard has no runs; use fewer shards")
    arguments = runs[0].arguments
    data = data_of(arguments)
    sets = sets_of(data, writes)
    pairs = data.read_pairs() if isinstance(data, FileData) and data.pair_reader is not None else data.pairs
    images: Counter[str] = Counter()
    for s in sets:
        images[s.role] += len(s.images)
    scores = [ood_score(text) for text in model_setting(arguments, "scores")]
    count = evaluations_a_model([s.role for s in sets], len(scores))
    n_scored = sum(n for role, n in images.items() if ROLES[role].is_scored)
    has_patches = any("local_cosine" in score.needs for score in scores)
    tuned = 2 if model_setting(arguments, "lst") else 1
    trained = next((run.arguments for run in runs if run.kind == "qat"), arguments)
    epochs = int(setting(trained, "trainer", "max_epochs", 0) or 0)
    gb = float(setting(arguments, "data", "decoded_gb", 100.0)) if setting(arguments, "data", "decoded", None) else 0.0
    n_pairs = 0 if pairs is None else len(pairs)
    surgeries = n_surgeries(next((run.arguments for run in runs if run.kind != "fp32"), arguments))
    about = (count, tuned, epochs, n_scored, has_patches, gb, surgeries)
    return Plan(runs, dict(images), len(sets), n_pairs, *about), sets


def plan_table(found: Plan, costs: Costs, cache: str) -> Table:
    """A plan for a terminal."""
    table = Table(title="plan", title_justify="left", show_header=False, box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    n = sum(found.images.values())
    table.add_row("runs (one process's work each)", f"{len(found.runs):,}")
    how = ["logit scale as it came, and tuned"] * (found.models_a_run > 1)
    how += [f"{found.surgeries} surgeries of each quantized one"] * (found.surgeries > 0)
    table.add_row("models judged" + (f" ({'; '.join(how)})" if how else ""), f"{found.models:,}")
    table.add_row(f"images of {found.n_sets} sets", f"{n:,}")
    for role, count in found.images.items():
        table.add_row(f"  {ROLES[role].title}", f"{count:,}")
    table.add_row("caption pairs", f"{found.n_pairs:,}")
    table.add_row("evaluation runs (model × data set × score)", f"[bold]{found.evaluations:,}[/]")
    table.add_section()
    for what, number in (disk := found.bytes_on_disk(costs, cache)).items():
        table.add_row(f"disk, {what}" + (f" (cache={cache})" if what == "features" else ""), size(number))
    table.add_row("disk, all", f"[bold]{size(sum(disk.values()))}[/]")
    table.add_section()
    for what, taken in (seconds := found.seconds(costs, cache)).items():
        table.add_row(f"hours of this machine, one process, {what}", f"{taken / 3600:,.1f}")
    table.add_row("hours, all but statistics", f"[bold]{sum(seconds.values()) / 3600:,.1f}[/]")
    ranges = [
        [f"{1e3 * end([getattr(c, kind) for c in costs.values()]):.3g}" for end in (min, max)]
        for kind in ("forward", "decode")
    ]
    encoded, decoded = (" to ".join(dict.fromkeys(ends)) for ends in ranges)
    caption = f"measured here: {encoded} ms per image encoded, {decoded} ms decoded"
    if unmeasured := [vlm for vlm, cost in costs.items() if not cost.is_measured]:
        caption += f"; not built here, taken as the mean of the others: {', '.join(unmeasured)}"
    table.caption, table.caption_justify = escape(caption), "left"
    return table


def _pixels(costs: Costs) -> int:
    """Bytes of an image that is decoded for all VLMs, once for those that want it framed alike."""
    return sum(3 * p.size**2 for p in {cost.preprocess for cost in costs.values()} if p is not None)


def size(number: float) -> str:
    """Bytes in words, e.g. ``"3.2 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
