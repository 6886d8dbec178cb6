"""A store filled with made-up but plausible runs, through the real store and the real metrics.

Images have a latent difficulty; a VLM's logits are a class signal and noise, and quantization adds noise of its own and
shrinks the signal, more with fewer bits. What comes out has the shapes a study has, not its findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.evaluation.evaluators import default_evaluators
from lightning_vlmq.evaluation.records import EvaluationSet
from lightning_vlmq.evaluation.results import rows_by_variant
from lightning_vlmq.metrics import ClasswiseGaps, LogitScale, functional
from lightning_vlmq.metrics.scores import OOD_SCORES, ScoreInputs
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import Statistics

CLASSES = 8
QUICK = Statistics(n_resamples=400, n_resamples_ranking=100)
SCALE = 12.0
TUNED_SCALE = 1.6  # what tuning multiplies the logits by
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "contrast")
LAYERS = [
    *((f"model.visual.transformer.resblocks.{i}.attn.{p}_proj", "vision/attention") for i in range(3) for p in "qkv"),
    *((f"model.visual.transformer.resblocks.{i}.mlp.{p}", "vision/mlp") for i in range(3) for p in ("c_fc", "c_proj")),
    *((f"model.transformer.resblocks.{i}.mlp.c_fc", "text/mlp") for i in range(2)),
    ("model.visual.proj", "vision/projection"),
]


def grid(
    vlms: Sequence[str] = ("vit_clean", "convnext_noisy"),
    methods: Sequence[str] = ("minmax", "lsq_contrastive"),
    bits: Sequence[tuple[int, int]] = ((8, 8), (4, 8)),
    scopes: Sequence[str] = ("vision", "vision_text"),
    seed: int = 0,
    tuned: bool = False,
) -> list[RunKey]:
    keys = []
    for vlm in vlms:
        pretrained = vlm.rpartition("_")[2]
        keys.append(RunKey(vlm, pretrained, "none", "fp32", 32, 32, seed))
        keys += [RunKey(vlm, pretrained, s, m, w, a, seed) for m in methods for w, a in bits for s in scopes]
    return keys + [key.tuned for key in keys if tuned]


def write_study(
    root: Path, keys: Sequence[RunKey], size: float = 1.0, code_version: str = "0.1.0", settings: Statistics = QUICK
) -> ResultsStore:
    store = ResultsStore(root)
    for key in keys:
        run_id = f"{key.model}-{key.method}{'.lst' if key.is_tuned else ''}-{key.bits}-{key.scope}-s{key.seed}"
        store.write(run_id, *make_run(key, run_id, size, code_version, settings), statistics=settings)
    return store


def make_run(
    key: RunKey, run_id: str, size: float = 1.0, code_version: str = "0.1.0", settings: Statistics = QUICK
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    full = replace(key, method="fp32", scope="none", weight_bits=32, act_bits=32, is_tuned=False)
    runs = [key] if key == full else [full, key]
    variants = [_Made(run, size) for run in runs]
    table = pd.concat(variants[-1].frames, ignore_index=True)
    found = rows_by_variant(variants, variants[-1].sets, default_evaluators(), settings)[-1]
    rows = [vars(row) for row in found]
    inside = {"dataset": "concepts", "role": "id"}
    if "fp32" not in key.method:
        about = {"coverage_weights": 0.985, "coverage_macs": 0.97, "clipped_layers": 8 - key.weight_bits}
        rows += [_row(name, value, 0.0, **inside) for name, value in about.items()]
    if not key.is_tuned:
        rows.append(_row("stable_rank", 5.2 + key.weight_bits / 10, 0.0, score="vision/mlp", **inside))
    frame = pd.DataFrame(rows).assign(**key.columns(), code_version=code_version, run_id=run_id)
    return frame, table, pd.DataFrame() if key.is_tuned else _curves(key)


def _sets() -> list[tuple[str, str, str, int, int]]:
    sets = [("concepts", "id", "", 0, 1600), ("novel", "near_ood", "", 0, 400)]
    sets += [("digits", "far_ood", "", 0, 400), ("textures", "far_ood", "", 0, 400)]
    sets += [(f"{c}_{s}", "corruption", c, s, 320) for c in CORRUPTIONS for s in range(1, 6)]
    sets += [(name, "shift", name, 0, 320) for name in ("inverted", "outline", "rotated", "posterised")]
    return sets + [(f"backgrounds_{name}", "spurious", "", 0, 800) for name in ("common", "counter")]


def _stream(*words: object) -> np.random.Generator:
    return np.random.default_rng(list("/".join(map(str, words)).encode()))


def _scale(key: RunKey) -> float:
    return (9 if "noisy" in key.model else SCALE) * (TUNED_SCALE if key.is_tuned else 1)


def _strength(key: RunKey) -> float:
    """Noise of quantization, relative to that of the images."""
    if "fp32" in key.method:
        return 0.0
    base = {8: 0.06, 6: 0.15, 4: 0.55}[key.weight_bits] * (0.45 if "lsq" in key.method else 1.0)
    return base * (1.3 if key.scope == "vision_text" else 1.0)


def _evaluate(
    key: RunKey, name: str, role: str, corruption: str, severity: int, n: int, size: float
) -> tuple[pd.DataFrame, torch.Tensor]:
    n = max(int(n * size), 12)
    base = name.rsplit("_", 1)[0] if role == "corruption" else name
    images, model = _stream("images", base, role), _stream("model", key.model, name)
    quantized = _stream("quantized", key.model, key.method, key.bits, key.scope, key.seed, name)
    is_ood = role.endswith("ood")
    target = images.integers(0, CLASSES, n)
    signal = {"near_ood": 0.9, "far_ood": 0.35, "shift": 1.3}.get(role, 2.4) * images.gamma(4, 0.25, n)
    signal = (
        signal
        * (1 - 0.13 * severity)
        * (0.72 if name.endswith("_counter") else 1)
        * (0.9 if "noisy" in key.model else 1)
    )
    strength = _strength(key)
    noise = 0.8 * images.normal(size=(n, CLASSES)) + 0.4 * model.normal(size=(n, CLASSES))
    full = torch.from_numpy((np.eye(CLASSES)[target] * signal[:, None] + noise) / 10 * _scale(key))
    noise = noise + strength * quantized.normal(size=(n, CLASSES))
    cosine = (np.eye(CLASSES)[target] * (signal * (1 - 0.25 * strength))[:, None] + noise) / 10
    logits = torch.from_numpy(cosine * _scale(key)).float()
    records = functional.per_sample(logits, torch.from_numpy(np.where(is_ood, -1, target)))
    inputs = ScoreInputs(cosine=torch.from_numpy(cosine).float(), logits=logits)
    records["kl"] = functional.kl_divergence(full, logits).float()
    records |= {score: OOD_SCORES[score](inputs) for score in ("mcm", "energy")}
    frame = pd.DataFrame({column: values.numpy() for column, values in records.items()})
    group = {"corruption": "corruptions", "spurious": ""}.get(role, "")
    where = {"dataset": name, "role": role, "corruption": corruption, "severity": severity, "group": group}
    return frame.assign(index=np.arange(n), target=np.where(is_ood, -1, target), **where), logits


class _Made:
    """What a run would have recorded: records and class-wise gaps by data set, see ``evaluation.judged.Variant``."""

    def __init__(self, key: RunKey, size: float) -> None:
        self.frames, self.sets = [], []
        self.scale, self.pairs_nll = LogitScale(_scale(key)), None
        self.records: dict = {}
        self.gaps: dict = {}
        for name, role, corruption, severity, n in _sets():
            frame, logits = _evaluate(key, name, role, corruption, severity, n, size)
            self.frames.append(frame)
            columns = {
                c: torch.from_numpy(np.array(frame[c]))
                for c in frame
                if c not in ("dataset", "role", "corruption", "severity", "group")
            }
            self.records[name] = columns
            place = EvaluationSet(name, role, corruption, severity, frame["group"].iloc[0])
            self.sets.append(
                SimpleNamespace(
                    name=name, **{f: getattr(place, f) for f in ("role", "corruption", "severity", "group")}
                )
            )
            if ROLES[role].is_classwise:
                metric = ClasswiseGaps(CLASSES, Statistics().n_bins)
                metric.update(columns["index"], logits, columns["target"])
                self.gaps[name] = metric.compute()


def _row(metric: str, value: float, stderr: float = np.nan, n: int = 0, score: str = "", **where: object) -> dict:
    empty = {"dataset": "", "role": "", "corruption": "", "severity": 0}
    return {**empty, **where, "score": score, "metric": metric, "value": value, "stderr": stderr, "n": n}


def _curves(key: RunKey) -> pd.DataFrame:
    parts = []
    for layer, group in LAYERS:
        rank = np.arange(1, (24 if "attn" in layer else 48) + 1)
        reference = (
            3 * np.exp(-rank / (10 if "attn" in layer else 20)) * (1 + 0.05 * _stream(layer).normal(size=len(rank)))
        )
        noise = _strength(key) * (0.15 if "text" not in layer or key.scope == "vision_text" else 0)
        values = np.sqrt(reference**2 + (noise * 2) ** 2 * _stream(layer, key.bits).gamma(20, 1 / 20, len(rank)))
        parts.append(pd.DataFrame({"layer": layer, "group": group, "x": rank, "y": values, "y_reference": reference}))
    return pd.concat(parts, ignore_index=True).assign(kind="singular_values")
