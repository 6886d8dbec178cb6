"""Error surgery in a real run: what is filed is what the quantized and the full-precision model would give."""

import numpy as np
import pytest
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything

from lightning_vlmq.callbacks import ErrorSurgery, ResultsWriter
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.results.store import ResultsStore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("surgery")
    seed_everything(0, verbose=False)
    module = EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=3, act_bits=8))
    callbacks = [ResultsWriter(str(root), "run"), ErrorSurgery([[0, 4], [4, None]]), ErrorSurgery([[0, None]])]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), use_distributed_sampler=False, **quiet)
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    return root, module, callbacks


def test_every_surgery_is_a_run_of_its_own(run):
    root, _, _ = run
    store = ResultsStore(root)
    expected = {"heal_0-4", "heal_4_up", "hurt_0-4", "hurt_4_up", "coherent", "incoherent", "heal_0_up", "hurt_0_up"}
    assert {run_id.removeprefix("run.") for run_id in store.run_ids()} >= expected
    rows = store.rows(["run.heal_0-4"])
    assert set(rows["variant"]) == {"surgery=heal 0-4"}
    assert {"id", "corruption", "shift", "near_ood", "far_ood", "spurious"} <= set(rows["role"])
    assert {"top1", "ece", "auroc", "rsg"} <= set(rows["metric"])


def test_healing_all_is_full_precision_and_hurting_all_is_the_model(run):
    _, module, (_, _, whole) = run
    healed, hurt = whole.surgeries["heal 0+"][1], whole.surgeries["hurt 0+"][1]
    assert set(healed) == {s.name for s in module.eval_sets}
    assert any("mcm" in columns for columns in healed.values())
    for name in healed:
        assert set(healed[name]) == set(module.records[name])  # scores are recorded where they are used
        for column in {"confidence", "mcm", "nll"} & set(healed[name]):
            np.testing.assert_allclose(
                healed[name][column], module.reference_records[name][column], rtol=1e-3, atol=1e-4
            )
            np.testing.assert_allclose(hurt[name][column], module.records[name][column], rtol=1e-3, atol=1e-4)
    assert {name for name, columns in healed.items() if "mcm" in columns} >= {"concepts", "digits"}
    assert any(not np.allclose(healed[n]["confidence"], hurt[n]["confidence"], atol=1e-3) for n in healed)


def test_part_of_the_data_is_passed_over(caplog):
    callback = ErrorSurgery()
    module = EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=4, act_bits=8))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], limit_val_batches=1, use_distributed_sampler=False, **quiet
    )
    trainer.validate(module, EmbeddedData(datasets=["concepts"], n_concepts=8), verbose=False)
    assert callback.surgeries == {} and "no error surgery" in caplog.text
