"""Error surgery in a real run: what is filed is what full precision and the image tower's error alone would give."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything

from lightning_vlmq.callbacks import ErrorSurgery, ResultsWriter
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.results.store import ResultsStore

EMBEDDED = Path(__file__).parents[2] / "configs" / "study" / "embedded.yaml"
SCORES = re.search(r"--model.scores=\[(.+)\]", EMBEDDED.read_text())[1].split(",")


def validated(module, callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), use_distributed_sampler=False, **quiet)
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    return module


def quantized(scope):
    quant = Quantization(method="minmax", scope=scope, weight_bits=3, act_bits=8)
    seed_everything(0, verbose=False)
    return EvaluationModule("vit_clean", quant=quant, scores=SCORES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("surgery")
    module = quantized("vision_text")
    callbacks = [ResultsWriter(str(root), "run"), ErrorSurgery([[0, 4], [4, None]]), ErrorSurgery([[0, None]])]
    return root, validated(module, callbacks), callbacks


@pytest.fixture(scope="module")
def module_of_the_image_tower():
    return validated(quantized("vision"), [])


def test_every_surgery_is_a_run_of_its_own(run):
    root, _, _ = run
    store = ResultsStore(root)
    expected = {
        "heal_0-4",
        "heal_4_up",
        "hurt_0-4",
        "hurt_4_up",
        "coherent",
        "incoherent",
        "heal_0_up",
        "hurt_0_up",
        "whole",
    }
    assert {run_id.removeprefix("run.") for run_id in store.run_ids()} >= expected
    rows = store.rows(["run.heal_0-4"])
    assert set(rows["variant"]) == {"surgery=heal 0-4"}
    assert {"id", "corruption", "shift", "near_ood", "far_ood", "spurious"} <= set(rows["role"])
    assert {"top1", "ece", "auroc", "rsg"} <= set(rows["metric"])


def test_healing_all_is_full_precision_and_hurting_all_is_the_image_tower_s_error(run, module_of_the_image_tower):
    """Both towers are quantized; the text tower's error is in no surgery."""
    _, module, (_, parts, whole) = run
    healed, hurt, left = (whole.surgeries[name][1] for name in ("heal 0+", "hurt 0+", "whole"))
    alone = module_of_the_image_tower.records
    assert set(healed) == {s.name for s in module.eval_sets}
    for name in healed:
        columns = {"confidence", "mcm", "nll", "kl"} & set(healed[name])
        for column in columns:
            close = {"rtol": 1e-3, "atol": 1e-4}
            np.testing.assert_allclose(healed[name][column], module.reference_records[name][column], **close)
            np.testing.assert_allclose(hurt[name][column], alone[name][column], **close)
            np.testing.assert_allclose(left[name][column], alone[name][column], **close)
            np.testing.assert_array_equal(left[name][column], parts.surgeries["whole"][1][name][column])
    for other in (alone, module.records):  # the text tower's error is something
        assert any(not np.allclose(healed[n]["confidence"], other[n]["confidence"], atol=1e-3) for n in healed)
    assert any(not np.allclose(alone[n]["confidence"], module.records[n]["confidence"], atol=1e-3) for n in healed)


def test_scores_are_those_that_features_of_images_have(run, caplog):
    """All eight of configs/study/embedded.yaml: those of patches are left out, which is said once."""
    _, module, (_, parts, _) = run
    assert set(module.scores) == set(SCORES)
    for name, records in parts.surgeries["coherent"][1].items():
        full = set(module.reference_records[name])
        assert set(records) == full - {"gl_mcm"}  # scores are recorded where they are used
    scored = {name for name, columns in module.records.items() if "gl_mcm" in columns}
    assert scored == {n for n, columns in parts.surgeries["whole"][1].items() if "knn" in columns} != set()
    assert "gl_mcm" not in {row.score for row in parts.surgeries["whole"][0]}
    for _ in range(2):
        parts._tell_what_is_left_out(SCORES, [score for score in SCORES if score != "gl_mcm"])
    assert parts._told == {"gl_mcm"} and "gl_mcm" not in caplog.text  # it was said in the run


def test_part_of_the_data_is_passed_over(caplog):
    callback = ErrorSurgery()
    module = EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=4, act_bits=8))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], limit_val_batches=1, use_distributed_sampler=False, **quiet
    )
    trainer.validate(module, EmbeddedData(datasets=["concepts"], n_concepts=8), verbose=False)
    assert callback.surgeries == {} and "no error surgery" in caplog.text
