"""Files what a run found: result rows, per-sample records and curves in the store, and trained models beside it."""

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
from lightning_vlmq.callbacks.bands import BandAccuracies
from lightning_vlmq.callbacks.spectrum import CURVE_COLUMNS, SingularValueSpectrum
from lightning_vlmq.callbacks.whole import partial_reason, require_place
from lightning_vlmq.core.atomic import remove_leftovers
from lightning_vlmq.core.identity import describe, digest
from lightning_vlmq.data.sets import EvalSet, in_distribution
from lightning_vlmq.quant import save_quantized
from lightning_vlmq.results.identity import run_identity
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.results.version import code_version

log = logging.getLogger(__name__)

_SET_COLUMNS = ("dataset", "role", "corruption", "severity")


class ResultsWriter(Callback):
    """Files a run's results when its validation or test has ended; in ``fit`` at its end, judged after the last step.

    The same model with its logit scale tuned is a run of its own, ``<run_id>.lst``, whose rows say ``is_tuned``.
    A quantized model that was trained is saved under ``<root>/models/<run_id>``, to be given to ``--model.checkpoint``.
    How long the model took to make (to quantize and, in ``fit``, to train, until the last validation began) is kept with the
    run, see :meth:`~lightning_vlmq.results.store.ResultsStore.seconds`: not as a row, for rows are the same in every repetition.

    What decides the numbers is the run's identity, kept with it. A name that stands for another identity in the store is refused
    before any work, and a partial run (a smoke run, some batches alone) files neither results nor a model, and says so.

    Args:
        root: the study's folder.
        run_id: the run's name in the store; by default a hash of its identity.

    Raises:
        VLMQError: before any work, a name that is no file name or taken by another run, or a folder that cannot be written.
    """

    def __init__(self, root: str = "logs/runs", run_id: str | None = None) -> None:
        self.root = Path(root)
        self.given_id = self.run_id = run_id
        self.store = ResultsStore(root)
        self.partial = ""
        self._identity: dict[str, Any] = {}
        self._judged_at: int | None = None
        if run_id is not None:
            self.store.require_name(run_id)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Name the run and give the module a place for its features, before anything is computed."""
        self._start = self._made = time.perf_counter()
        self._judged_at = None
        self.partial = ""
        if not hasattr(pl_module, "run_key"):
            return
        pl_module.cache.settle(self.root / "cache")
        if trainer.state.fn == "predict":
            return
        self.partial = partial_reason(trainer, f"nothing is filed in '{self.root}'")
        if self.partial:
            return
        self._identity = describe(run_identity(trainer, pl_module))
        self.run_id = self.given_id or digest(self._identity, 12)
        if trainer.is_global_zero:
            require_place(self.root, "results")
            remove_leftovers(self.root, below=True)
            self.store.require_same(self.run_id, self._identity)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the time: the model to be judged is there."""
        self._made = time.perf_counter()

    on_test_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """File the rows; in a fit remember after which step they are, for later steps may follow."""
        if trainer.sanity_checking or not getattr(pl_module, "rows", None):
            return
        if trainer.state.fn == "fit":
            self._judged_at = trainer.global_step
        elif trainer.is_global_zero and not self.partial:
            self._write(trainer, pl_module)

    on_test_end = on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Judge what the fit ended with, where no validation came after the last step."""
        if self.partial or not hasattr(pl_module, "run_key") or self._judged_at == trainer.global_step:
            return
        if trainer.is_global_zero:
            log.warning("no validation came after the last step: the trained model is validated now")
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """File the rows and save the trained quantized model."""
        if self.partial or not trainer.is_global_zero or not hasattr(pl_module, "run_key"):
            return
        if getattr(pl_module, "quantized", None) is not None:
            folder = self.root / "models" / str(self.run_id)
            save_quantized(pl_module.vlm, folder, pl_module.quantized)
        if pl_module.rows:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: Any) -> None:
        assert self.run_id is not None
        fixed = {**module.run_key.columns(), "code_version": code_version(), "run_id": self.run_id}
        rows = [{**asdict(row), **fixed} for row in module.rows]
        curves = [pd.DataFrame(columns=list(CURVE_COLUMNS))]
        inside = in_distribution(module.eval_sets)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SingularValueSpectrum | ActivationSpectrum | BandAccuracies):
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
        source = str(module.vlm.provenance or "")
        companions = []
        if module.tuned_records is not None:  # first: a run counts as done once its own part is there
            companions.append(f"{self.run_id}.lst")
            tuned = {**module.run_key.tuned.columns(), "code_version": code_version(), "run_id": f"{self.run_id}.lst"}
            tuned_rows = pd.DataFrame([{**asdict(row), **tuned} for row in module.tuned_rows])
            samples = _sample_table(module.eval_sets, module.tuned_records)
            self.store.write(
                tuned["run_id"],
                tuned_rows,
                samples,
                pd.DataFrame(),
                statistics=module.statistics,
                identity=self._identity,
                source=source,
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name, (own_rows, records) in getattr(callback, "surgeries", {}).items():
                key = replace(
                    module.run_key, variant=", ".join(filter(None, (module.run_key.variant, f"surgery={name}")))
                )
                run_id = f"{self.run_id}.{name.replace(' ', '_').replace('+', '_up')}"
                companions.append(run_id)
                columns = {**key.columns(), "code_version": code_version(), "run_id": run_id}
                table = pd.DataFrame([{**asdict(row), **columns} for row in own_rows])
                samples = _sample_table(module.eval_sets, records)
                said = (None, module.statistics, self._identity, (), None, source)
                self.store.write(run_id, table, samples, pd.DataFrame(), *said)
        samples = _sample_table(module.eval_sets, module.records)
        points = pd.concat([part for part in curves if len(part)] or curves)
        self.store.write(
            self.run_id,
            pd.DataFrame(rows),
            samples,
            points,
            self._made - self._start,
            module.statistics,
            self._identity,
            companions,
            {
                "seconds": time.perf_counter() - self._start,
                "forward_seconds": module.cache.seconds,
                "forward_images": module.cache.images,
                "cache_hits": module.cache.hits,
                "cache_misses": module.cache.misses,
            },
            source,
        )


def _sample_table(sets: Sequence[EvalSet], records: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    parts = []
    for s in sets:
        where = {key: getattr(s, "name" if key == "dataset" else key) for key in (*_SET_COLUMNS, "group")}
        parts.append(pd.DataFrame({key: column.numpy() for key, column in records[s.name].items()}).assign(**where))
    return pd.concat(parts)
