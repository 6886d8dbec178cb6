"""Files what a run found: result rows, per-sample records and curves in the store; trained models beside it; predictions on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from lightning import Callback, Trainer
from torch import Tensor

from lightning_vlmq.callbacks.activations import ActivationSpectrum
from lightning_vlmq.callbacks.spectrum import CURVE_COLUMNS, SingularValueSpectrum
from lightning_vlmq.core.identity import describe, digest
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.quant import save_quantized
from lightning_vlmq.results.identity import run_identity, why_partial
from lightning_vlmq.results.store import ResultsStore, code_version

log = logging.getLogger(__name__)

_SET_COLUMNS = ("dataset", "role", "corruption", "severity")


class ResultsWriter(Callback):
    """Files a run's results when its validation (in ``fit``: the last one) or test has ended.

    The same model with its logit scale tuned is a run of its own, ``<run_id>.lst``, whose rows say ``is_tuned``.
    A quantized model that was trained is saved under ``<root>/models/<run_id>``, to be given to ``--model.checkpoint``.
    How long the model took to make (to quantize and, in ``fit``, to train, until the last validation began) is kept with the
    run, see :meth:`~lightning_vlmq.results.store.ResultsStore.seconds`: not as a row, for rows are the same in every repetition.

    Args:
        root: the study's folder.
        run_id: the run's name in the store; by default a hash of everything that decides its numbers, see
            :func:`~lightning_vlmq.results.identity.run_identity`.

    A run that sees less than all data (``fast_dev_run``, ``limit_val_batches`` and its like) files nothing and says so.

    Raises:
        VLMQError: before anything is computed, if the root holds another experiment under the run id.
    """

    def __init__(self, root: str = "logs/runs", run_id: str | None = None) -> None:
        self.root = Path(root)
        self.run_id = run_id
        self.store = ResultsStore(root)
        self._partial: str | None = None
        self._identity: Any = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Name the run and give the module a place for its features, before anything is computed."""
        self._start = self._made = time.perf_counter()
        if not hasattr(pl_module, "run_key"):
            return
        self._partial = why_partial(trainer)
        self._identity = describe(run_identity(trainer, pl_module))
        if self.run_id is None:
            self.run_id = digest(self._identity, 12)
        elif self._partial is None and trainer.is_global_zero:
            self.store.require_same(self.run_id, self._identity)
        if self._partial is not None and stage != "predict" and trainer.is_global_zero:
            log.warning("nothing is filed in '%s': the run does not see all data (%s)", self.root, self._partial)
        if getattr(pl_module.cache, "folder", None) is None:
            pl_module.cache.folder = self.root / "cache"

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the time: the model to be judged is there."""
        self._made = time.perf_counter()

    on_test_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """File the rows, unless training goes on."""
        training_goes_on = trainer.state.fn == "fit" and trainer.global_step < trainer.estimated_stepping_batches
        if (
            trainer.is_global_zero
            and self._partial is None
            and getattr(pl_module, "rows", None)
            and not trainer.sanity_checking
            and not training_goes_on
        ):
            self._write(trainer, pl_module)

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the trained quantized model."""
        if trainer.is_global_zero and self._partial is None and getattr(pl_module, "quantized", None) is not None:
            folder = self.root / "models" / str(self.run_id)
            save_quantized(pl_module.vlm, folder, pl_module.quantized)

    def _write(self, trainer: Trainer, module: Any) -> None:
        assert self.run_id is not None
        fixed = {**module.run_key.columns(), "code_version": code_version(), "run_id": self.run_id}
        rows = [{**asdict(row), **fixed} for row in module.rows]
        curves = [pd.DataFrame(columns=list(CURVE_COLUMNS))]
        inside = next(s for s in module.eval_sets if s.role == "id")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SingularValueSpectrum | ActivationSpectrum):
                curves.append(callback.curves())
                where = {
                    "dataset": inside.name,
                    "role": "id",
                    "corruption": "",
                    "severity": 0,
                    "stderr": 0.0,
                    "n": 0,
                    **fixed,
                }
                for group, values in callback.rows().items():
                    rows += [
                        {"score": group, "metric": metric, "value": value, **where} for metric, value in values.items()
                    ]
        if module.tuned_records is not None:  # first: a run counts as done once its own part is there
            tuned = {**module.run_key.tuned.columns(), "code_version": code_version(), "run_id": f"{self.run_id}.lst"}
            tuned_rows = pd.DataFrame([{**asdict(row), **tuned} for row in module.tuned_rows])
            samples = _sample_table(module.eval_sets, module.tuned_records)
            self.store.write(
                tuned["run_id"], tuned_rows, samples, pd.DataFrame(), None, module.statistics, self._identity
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name, (own_rows, records) in getattr(callback, "surgeries", {}).items():
                key = replace(
                    module.run_key, variant=", ".join(filter(None, (module.run_key.variant, f"surgery={name}")))
                )
                run_id = f"{self.run_id}.{name.replace(' ', '_').replace('+', '_up')}"
                columns = {**key.columns(), "code_version": code_version(), "run_id": run_id}
                table = pd.DataFrame([{**asdict(row), **columns} for row in own_rows])
                samples = _sample_table(module.eval_sets, records)
                self.store.write(run_id, table, samples, pd.DataFrame(), None, module.statistics, self._identity)
        samples = _sample_table(module.eval_sets, module.records)
        points = pd.concat([part for part in curves if len(part)] or curves)
        seconds = self._made - self._start
        self.store.write(self.run_id, pd.DataFrame(rows), samples, points, seconds, module.statistics, self._identity)


def _sample_table(sets: Sequence[EvalSet], records: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    parts = []
    for s in sets:
        where = {key: getattr(s, "name" if key == "dataset" else key) for key in (*_SET_COLUMNS, "group")}
        parts.append(pd.DataFrame({key: column.numpy() for key, column in records[s.name].items()}).assign(**where))
    return pd.concat(parts)
