"""A run's identity: every setting that decides a number is in it, and every other one says why not."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pandas as pd
import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from safetensors.torch import save_file

from lightning_vlmq import callbacks
from lightning_vlmq.callbacks import ResultsWriter
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import digest
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.evaluation.evaluators import (
    ClassificationEvaluator,
    CorruptionEvaluator,
    OODEvaluator,
    SpuriousEvaluator,
)
from lightning_vlmq.models import zoo
from lightning_vlmq.modules import EvaluationModule, QATModule, Quantization
from lightning_vlmq.quant import LayerRule, save_quantized
from lightning_vlmq.results.identity import run_identity, why_partial
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import Statistics

SMALL = {**SMALL_DATA, "datasets": ["concepts", "unseen"], "n_concepts": 8}
MINMAX = Quantization(method="minmax")
REAL_MODELS_ONLY = {"trained_like": "openai", "activation": "quick_gelu"}  # they end in the architecture's digest
LSQ = Quantization(method="lsq_contrastive", weight_bits=4)


def trainer(*callbacks, **flags):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    sharded = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **sharded, **flags})


def validate(module, *callbacks, data=None, **flags):
    seed_everything(0, verbose=False)
    trainer(*callbacks, **flags).validate(module, data or EmbeddedData(**SMALL), verbose=False)
    return module


def parameters(kind):
    names = set(inspect.signature(kind).parameters)
    return (names - {"args", "kwargs"}) | (parameters(kind.__mro__[1]) if "kwargs" in names else set())


def check_each(kind, start, changed, exempt, refused=None):
    """Every constructor argument is changed in turn; ``exempt`` says why the others leave the identity as it is."""
    refused = refused or {}
    assert set(changed) | set(exempt) | set(refused) == parameters(kind), "a new argument: say here whether it counts"
    for name, value in refused.items():
        with pytest.raises(VLMQError):
            kind(**{**start, name: value})
    first = digest(kind(**start))
    assert digest(kind(**start)) == first
    for name, value in changed.items():
        assert digest(kind(**{**start, name: value})) != first, name
    for name, (value, _reason) in exempt.items():
        assert digest(kind(**{**start, name: value})) == first, name


class SetUp(EmbeddedData):
    """Set up at once, so that its content is known."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.setup()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from lightning_vlmq.models import load_vlm
    from lightning_vlmq.quant import QuantScheme, quantize

    folders = []
    for bits in (4, 8):
        vlm, scheme = load_vlm("vit_clean"), QuantScheme(bits, 8)
        batch = {"image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), "tokens": vlm.tokenize(["a"] * 4)}
        folders.append(tmp_path_factory.mktemp("saved") / f"w{bits}")
        save_quantized(vlm, folders[-1], quantize(vlm, "minmax", scheme, [batch]))
    return folders


def test_every_argument_of_the_evaluation_module(saved, tmp_path):
    save_file(zoo.build("vit_clean").state_dict(), tmp_path / "other.safetensors")
    check_each(
        EvaluationModule,
        {"vlm": "vit_clean", "quant": MINMAX},
        {
            "vlm": "align_clean",
            "pretrained": str(tmp_path / "other.safetensors"),
            "quant": Quantization(method="minmax", act_bits=6),
            "checkpoint": str(saved[0]),
            "scores": ["mcm(temperature=0.5)"],
            "lst": True,
            "evaluators": [ClassificationEvaluator()],
            "statistics": Statistics(n_bins=5),
            "outliers": 50.0,
        },
        {
            "cache": ("elsewhere", "where features are kept decides no number"),
            "kept_features": ("none", "nor which of them are"),
        },
        REAL_MODELS_ONLY,
    )
    assert digest(EvaluationModule("vit_clean", checkpoint=str(saved[0]))) != digest(
        EvaluationModule("vit_clean", checkpoint=str(saved[1]))
    )


def test_every_field_of_the_quantization():
    changed = {
        "method": "mse",
        "options": {"share": 0.999},
        "weight_bits": 4,
        "act_bits": 4,
        "weight_granularity": "per_group",
        "group_size": 16,
        "act_granularity": "per_token",
        "weight_symmetric": False,
        "act_symmetric": True,
        "act_dynamic": False,
        "scope": "vision_text",
        "first_last": "skip",
        "overrides": [LayerRule("*fc1*", weight_bits=4)],
        "attention": "int8",
        "minimum_coverage": 0.5,
    }
    assert set(changed) == {f.name for f in fields(Quantization)}, "a new field: say here what else it could be"
    start = Quantization(method="percentile", act_dynamic=True)
    identities = {digest(replace(start, **{name: value})) for name, value in changed.items()}
    assert len(identities | {digest(start)}) == 1 + len(changed)


def test_every_argument_of_training():
    check_each(
        QATModule,
        {"vlm": "vit_clean", "quant": LSQ},
        {
            "vlm": "align_clean",
            "quant": Quantization(method="lsq_contrastive", weight_bits=3),
            "scores": ["msp"],
            "lst": True,
            "evaluators": [],
            "statistics": Statistics(seed=1),
            "outliers": 50.0,
            "weight_lr": 1e-4,
            "weight_decay": 0.1,
            "step_lr": 0.1,
            "held_out": 0.2,
        },
        {
            "cache": ("elsewhere", "where features are kept decides no number"),
            "kept_features": ("reference", "nor which of them are"),
            "pretrained": (None, "as in the evaluation module"),
            "checkpoint": (None, "as in the evaluation module"),
        },
        REAL_MODELS_ONLY,
    )


def test_every_argument_of_the_embedded_data(tmp_path):
    check_each(
        SetUp,
        {**SMALL_DATA, "n_concepts": 12},
        {
            "datasets": ["concepts"],
            "n_concepts": 16,
            "n_id": 10,
            "n_shifted": 3,
            "n_ood": 20,
            "corruptions": ["contrast"],
            "severities": [5],
            "renditions": ["outline"],
            "data_seed": 1,
            "train_batch_size": 100,
            "calibration_pairs": 100,
        },
        {
            "path": (None, "its files' content is hashed, wherever they lie"),
            "on_bad_image": ("skip", "the same images are read or the run stops"),
            "batch_size": (7, "each sample is evaluated by itself"),
            "num_workers": (1, "who loads the images does not change them"),
            "decoded": (str(tmp_path), "the same images, from files that were made of them"),
        },
    )


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (ClassificationEvaluator, {}),
        (OODEvaluator, {"scores": ("mcm",)}),
        (SpuriousEvaluator, {}),
        (CorruptionEvaluator, {"baseline": "alexnet"}),
    ],
)
def test_every_argument_of_the_evaluators(kind, changed):
    check_each(kind, {}, changed, {})


def test_every_field_of_the_statistics():
    first = digest(Statistics())
    for field in fields(Statistics):
        value = getattr(Statistics(), field.name)
        assert digest(replace(Statistics(), **{field.name: value + 3 if value >= 1 else value / 2 + 0.01})) != first, (
            field.name
        )


def test_seed_precision_and_training_of_the_trainer(monkeypatch):
    data = SetUp(**SMALL)

    def identity(fn="fit", seed="0", **flags):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        made = trainer(**flags)
        made.datamodule, made.state.fn = data, fn
        return digest(run_identity(made, module))

    module = QATModule("vit_clean", quant=LSQ)
    first = identity(max_epochs=3)
    changed = [identity(seed="1", max_epochs=3), identity(max_epochs=2), identity(max_epochs=3, precision="64-true")]
    changed += [identity(max_epochs=3, gradient_clip_val=1.0), identity(max_epochs=3, accumulate_grad_batches=2)]
    changed += [identity(max_epochs=3, max_steps=5), identity("validate", max_epochs=3)]
    assert len({first, *changed}) == 8
    assert identity(max_epochs=3, log_every_n_steps=1, enable_progress_bar=True) == first
    assert identity("validate", max_epochs=3) == identity("validate", max_epochs=2)  # nothing is trained


def identity_of(method, callbacks=(), **data):
    made = trainer(*callbacks)
    made.datamodule, made.state.fn = SetUp(**{**SMALL, **data}), "validate"
    quant = Quantization(method=method, weight_bits=4)
    return digest(run_identity(made, EvaluationModule("vit_clean", quant=quant)))


def test_batches_count_where_a_method_sees_them():
    sizes = {
        method: {identity_of(method, batch_size=size) for size in (7, 50)} for method in ("minmax", "matched_noise")
    }
    assert {method: len(found) for method, found in sizes.items()} == {"minmax": 1, "matched_noise": 2}


def test_callbacks_that_file_rows_say_what_decides_them():
    changed = {
        callbacks.ActivationSpectrum: {"n_images": 50},
        callbacks.BandAccuracies: {"bands": [[0, 4], [4, None]]},
        callbacks.ErrorSurgery: {"bands": [[0, 4], [4, None]]},
        callbacks.SingularValueSpectrum: {"top_ranks": [3]},
    }
    only_write = {"CoveragePrinter", "GridTrajectories", "HeadlinePrinter", "PredictionWriter", "QuantizedModelWriter"}
    only_write |= {"ReliabilityDiagrams", "ResultsWriter", "RunSummary", "ZooExport"}
    assert {kind.__name__ for kind in changed} | only_write == set(callbacks.__all__), (
        "a new callback: does it file rows?"
    )
    found = {identity_of("minmax")}
    for kind, arguments in changed.items():
        found |= {identity_of("minmax", [kind()]), identity_of("minmax", [kind(**arguments)])}
    assert len(found) == 1 + 2 * len(changed)


def test_two_settings_are_two_runs_in_one_root(tmp_path):
    for n_bins in (15, 5, 5):
        module = EvaluationModule("vit_clean", scores=["mcm"], statistics=Statistics(n_bins=n_bins))
        validate(module, ResultsWriter(str(tmp_path)))
    store = ResultsStore(tmp_path)
    rows = store.rows().query("metric == 'ece' and role == 'id'")
    assert len(store.run_ids()) == len(set(rows["run_id"])) == 2  # the third is the second again


def test_another_experiment_under_a_taken_name_is_refused_before_work(tmp_path):
    def run(n_bins, **flags):
        module = EvaluationModule("vit_clean", scores=["mcm"], statistics=Statistics(n_bins=n_bins))
        return validate(module, ResultsWriter(str(tmp_path), "mine"), **flags)

    run(15)
    kept = ResultsStore(tmp_path).rows()
    with pytest.raises(VLMQError, match=r"another run 'mine' \(module.is.statistics.n_bins was 15, is 5\)"):
        run(5)
    with pytest.raises(VLMQError, match=r"precision was '32-true', is '64-true'"):
        run(15, precision="64-true")
    run(15)
    pd.testing.assert_frame_equal(ResultsStore(tmp_path).rows(), kept)


@pytest.mark.parametrize("flags", [{"limit_val_batches": 1}, {"limit_val_batches": 0.5}, {"fast_dev_run": True}])
def test_partial_runs_file_nothing_and_say_so(tmp_path, caplog, flags):
    validate(EvaluationModule("vit_clean", scores=["mcm"]), ResultsWriter(str(tmp_path), "mine"))
    kept = ResultsStore(tmp_path).rows()
    data = EmbeddedData(**SMALL, batch_size=5)
    validate(EvaluationModule("vit_clean", scores=["mcm"]), ResultsWriter(str(tmp_path), "mine"), data=data, **flags)
    pd.testing.assert_frame_equal(ResultsStore(tmp_path).rows(), kept)
    assert "nothing is filed" in caplog.text and next(iter(flags)) in caplog.text


def test_what_makes_a_run_partial():
    def reason(fn, **flags):
        made = trainer(**flags)
        made.state.fn = fn
        return why_partial(made)

    assert reason("validate") is None and reason("validate", limit_val_batches=1.0) is None
    assert reason("validate", limit_val_batches=1) == "limit_val_batches=1"
    assert reason("fit", limit_train_batches=0.5) == "limit_train_batches=0.5"
    assert reason("validate", limit_train_batches=0.5) is None  # it trains nothing
    assert reason("test", limit_test_batches=2) == "limit_test_batches=2"
    assert reason("fit", overfit_batches=1) == "overfit_batches=1"


def test_precisions_share_a_cache_and_no_features(tmp_path):
    def ece(root, precision):
        module = EvaluationModule("vit_clean", quant=MINMAX, scores=["mcm"], cache=str(root))
        validate(module, precision=precision)
        return next(row.value for row in module.rows if row.metric == "nll" and row.role == "id")

    alone = {p: ece(tmp_path / p, p) for p in ("32-true", "bf16-mixed")}
    shared = {p: ece(tmp_path / "shared", p) for p in ("32-true", "bf16-mixed", "32-true")}
    assert shared == alone and len(set(alone.values())) == 2
