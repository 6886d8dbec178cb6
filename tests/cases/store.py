"""Rows, samples and curves of a made-up run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.version import code_version

KEY = RunKey("vit_clean", "clean", "vision", "minmax", 4, 8, seed=3)


def make_rows(run_id: str, metrics: tuple[str, ...] = ("top1", "ece"), key: RunKey = KEY) -> pd.DataFrame:
    rng = np.random.default_rng(len(run_id))
    shared = {"dataset": "pictures", "role": "id", "corruption": "", "severity": 0, "score": "", "n": 100}
    return pd.DataFrame(
        [
            {**key.columns(), **shared, "metric": metric, "value": rng.random(), "stderr": rng.random() / 10}
            | {"code_version": code_version(), "run_id": run_id}
            for metric in metrics
        ]
    )


def make_samples(n: int = 100) -> pd.DataFrame:
    rng = np.random.default_rng(n)
    frame = pd.DataFrame(
        {"dataset": "pictures", "role": "id", "corruption": "", "severity": 0, "group": "", "index": np.arange(n)}
    )
    frame["target"] = rng.integers(0, 10, n)
    frame["prediction"] = rng.integers(0, 10, n)
    frame["confidence"] = rng.random(n).astype(np.float32)
    frame["correct"] = frame["target"] == frame["prediction"]
    frame["correct_top5"] = frame["correct"]
    for name in ("nll", "brier", "kl", "mcm", "energy"):
        frame[name] = rng.random(n).astype(np.float32)
    return frame


def make_curves() -> pd.DataFrame:
    points = {"x": [1.0, 2.0], "y": [3.0, 1.5], "y_reference": [3.1, 1.4]}
    return pd.DataFrame({"kind": "singular_values", "layer": "blocks.0.q_proj", "group": "attention", **points})
