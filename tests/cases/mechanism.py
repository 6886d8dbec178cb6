"""A store of a made-up mechanism study: controls and surgeries that are the quantization itself, or nothing."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from cases.study import grid, make_run
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore

VLMS = ("vit_clean", "convnext_noisy", "siglip_clean")


def _write(
    store: ResultsStore, key: RunKey, run_id: str, like: RunKey | None = None, sqnr: float | None = None
) -> None:
    rows, samples, curves = make_run(like or key, run_id, size=0.5)
    rows = rows.assign(**key.columns())
    if sqnr is not None:
        first = rows.iloc[:1]
        new = {"mean_sqnr_db": sqnr, "gain_0-8": 0.8 + sqnr / 100, "gain_stderr_0-8": 0.01}
        new |= {"filter_share_0-8": 0.25, "sqnr_db_0-8": sqnr + 3}
        own = [
            first.assign(score="vision/output", metric=metric, value=value, dataset="concepts", role="id")
            for metric, value in new.items()
        ]
        rows = pd.concat([rows, *own], ignore_index=True)
    store.write(run_id, rows, samples, curves, facts={"seconds": 60.0})


def write_mechanism(root: Path) -> None:
    """Three quantizations of three models; of min-max: noise that is it, a filter that does nothing, and surgeries likewise."""
    store = ResultsStore(root)
    keys = grid(VLMS, methods=("minmax", "gptq", "mse"), bits=((4, 8),), scopes=("vision",))
    for number, key in enumerate(keys):
        _write(store, key, f"r{number}", sqnr=None if key.is_full_precision else 20.0 + number % 4)
        if key.method != "minmax":
            continue
        for seed in range(5):  # the quantization itself, under a control's name
            control = replace(key, method="matched_noise", variant=f"seed={seed}")
            own = {0: 18.0, 1: 19.0}.get(seed) if number < 4 else None  # gains of .98 and .99
            _write(store, control, f"r{number}c{seed}", like=key, sqnr=own)
        full = next(k for k in keys if k.model == key.model and k.is_full_precision)
        _write(store, replace(key, method="spectral_shrink"), f"r{number}f", like=full)  # one that does nothing
        _write(
            store, replace(key, variant="surgery=heal 64+"), f"r{number}h", like=key
        )  # the change is all in low ranks
        _write(store, replace(key, variant="surgery=hurt 64+"), f"r{number}k", like=full)
        _write(store, replace(key, variant="surgery=whole"), f"r{number}w", like=key)
