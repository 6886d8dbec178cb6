"""The evaluation and QAT modules in a real Trainer on the embedded zoo."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from safetensors.torch import load_file
from torch.nn import functional as F

from lightning_vlmq.callbacks import ResultsWriter, SingularValueSpectrum
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.evaluation.digests import Computation, tower_digest
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.modules import EvaluationModule, QATModule, Quantization
from lightning_vlmq.results.store import ResultsStore


def random_siglip():
    torch.manual_seed(0)
    return load_vlm("siglip_clean", "none")


def trainer(**kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu", logger=False, use_distributed_sampler=False, num_sanity_val_steps=0, **quiet, **kwargs
    )


def validate(module, *callbacks):
    seed_everything(0, verbose=False)
    trainer(callbacks=list(callbacks)).validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    return module


@pytest.fixture(scope="module")
def quantized():
    return validate(
        EvaluationModule(
            "vit_clean", quant=Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
        )
    )


def values(module):
    # as text, in which NaN equals NaN: a relative change from zero is undefined
    return {(r.dataset, r.score, r.metric): (repr(r.value), repr(r.stderr)) for r in module.rows}


def test_every_metric_of_every_role_has_value_and_stderr(quantized):
    rows = pd.DataFrame([vars(r) for r in quantized.rows])
    means = {"top1", "top5", "ece", "mce", "adaptive_ece", "brier", "nll", "aurc", "augrc", "coverage_at_risk"}
    means |= {"ece_debiased", "adaptive_ece_debiased", "signed_calibration_error"}
    flips = {"agreement", "flips", "flips_broken", "flips_repaired", "kl"}
    labelled = means | flips | {f"delta_{m}" for m in means}
    classwise = {"classwise_ece", "classwise_ece_debiased"}
    whole = labelled | classwise | {f"delta_{m}" for m in classwise}
    gaps = {"rsg", "common", "counter"}
    detection = {"auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_openood"}
    expected = {
        "id": whole
        | {"coverage_weights", "coverage_macs", "bits_per_weight", "clipped_layers", "output_sqnr_db", "logit_scale"},
        "corruption": labelled | {"mean_corruption_error", "relative_mean_corruption_error"},
        "shift": whole,
        "near_ood": detection | {f"delta_{m}" for m in detection},
        "far_ood": detection | {f"delta_{m}" for m in detection},
        "spurious": whole | gaps | {f"delta_{m}" for m in gaps} | {"vuln_add"},
    }
    assert {role: set(group["metric"]) for role, group in rows.groupby("role")} == expected
    absolute = rows[~rows["metric"].str.startswith("delta_") & ~rows["metric"].str.contains("classwise_ece_debiased")]
    undefined = absolute[
        absolute["value"].isna()
    ]  # this few images: full precision loses nothing that can be told from 0
    assert set(undefined["metric"]) <= {"mean_corruption_error", "relative_mean_corruption_error"}
    assert set(rows.loc[rows["role"] == "near_ood", "score"]) == {"mcm", "msp", "maxlogit", "energy", "entropy"}
    assert not quantized.tuned_rows and quantized.tuned_records is None
    assert rows.query("metric == 'coverage_weights'")["value"].min() > 0.95


def test_top1_equals_a_plain_loop(quantized):
    data = EmbeddedData(**SMALL_DATA)
    data.setup()
    vlm = EvaluationModule("vit_clean").vlm
    with torch.no_grad():
        for s in data.eval_sets:
            if s.role in ("near_ood", "far_ood"):
                continue
            classes = vlm.class_features(s.class_names or data.class_names, data.templates)
            right = (
                vlm.zero_shot_logits(vlm.encode_image(s.images.images), classes).argmax(1) == s.images.columns["target"]
            )
            recorded = quantized.reference_records[s.name]["correct"]
            assert recorded.float().mean().item() == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_divergence_equals_torchs_of_both_models_probabilities(quantized):
    """Of the model as it is, and of the tuned one, from full precision under its own scale."""
    settings = Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
    module = validate(EvaluationModule("vit_clean", quant=settings, lst=True))
    s = module.eval_sets[0]
    models = {"full": module.reference, "own": module.vlm}
    with torch.no_grad():
        logits = {
            name: vlm.zero_shot_logits(
                vlm.encode_image(s.images.images), vlm.class_features(module.data.class_names, module.data.templates)
            )
            for name, vlm in models.items()
        }
    found = {
        (r.metric, tuned): r.value
        for tuned in (0, 1)
        for r in (module.rows, module.tuned_rows)[tuned]
        if r.dataset == s.name
    }
    scales = {row.metric: row.value for row in module.tuned_rows if row.metric == "logit_scale"}
    logits["tuned"] = logits["own"] * scales["logit_scale"] / module.vlm.logit_scale().item()
    for tuned, name in enumerate(("own", "tuned")):
        target = logits["full"].double().log_softmax(1)
        expected = F.kl_div(logits[name].double().log_softmax(1), target, reduction="batchmean", log_target=True)
        assert found["kl", tuned] == pytest.approx(float(expected), rel=1e-3) and float(expected) > 1e-5
    assert found["kl", 0] != found["kl", 1]


def test_same_seed_same_bits(quantized):
    again = validate(
        EvaluationModule(
            "vit_clean", quant=Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
        )
    )
    assert values(again) == values(quantized)


def test_full_precision_has_no_changes():
    module = validate(EvaluationModule("convnext_clean"))
    assert module.reference_records is None and module.run_key.is_full_precision
    against = ("delta", "flips", "agreement", "vuln_add", "mean_corruption_error")
    assert not any(r.metric.startswith(against) for r in module.rows)


def test_cached_features_change_nothing_and_are_used(quantized, tmp_path, monkeypatch):
    settings = Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
    first = validate(EvaluationModule("vit_clean", quant=settings, cache=str(tmp_path)))
    classifiers = 4  # two of each model: unseen concepts have names of their own
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * len(first.records) + classifiers
    second = EvaluationModule("vit_clean", quant=settings, cache=str(tmp_path))
    monkeypatch.setattr(FeatureCache, "put", lambda *_: pytest.fail("a forward pass was run again"))
    assert values(validate(second)) == values(first) == values(quantized)


def test_a_score_added_later_costs_no_forward_pass(tmp_path, monkeypatch):
    settings = Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
    validate(EvaluationModule("vit_clean", quant=settings, scores=["msp"], cache=str(tmp_path)))
    encoded: list[int] = []
    for name in ("encode_image", "encode_text"):
        run = getattr(VLM, name)
        monkeypatch.setattr(VLM, name, lambda vlm, x, run=run: encoded.append(len(x)) or run(vlm, x))
    more = EvaluationModule(
        "vit_clean", quant=settings, scores=["msp", "energy", "mcm(temperature=0.5)"], cache=str(tmp_path)
    )
    begin = EvaluationModule.on_validation_epoch_start
    monkeypatch.setattr(EvaluationModule, "on_validation_epoch_start", lambda m: (encoded.clear(), begin(m)))
    validate(more)
    assert encoded == [] and more.cache.misses == 0 and more.cache.hits > 0 and more.cache.seconds == 0
    assert {"energy", "mcm(temperature=0.5)"} <= {row.score for row in more.rows}
    validate(EvaluationModule("vit_clean", quant=settings, scores=["msp"], kept_features="none"))
    assert sum(encoded) > 0  # the counter counts


def test_scopes_share_a_vision_tower_and_full_precision_is_encoded_once(tmp_path):
    """Under ``reference``: the second scope encodes no image at all, and only full precision's features stay."""
    cached = []
    for scope in ("vision", "vision_text"):
        settings = Quantization(method="minmax", scope=scope, weight_bits=4, act_bits=8)
        options = {"scores": ["msp"], "cache": str(tmp_path), "kept_features": "reference"}
        cached.append(validate(EvaluationModule("vit_clean", quant=settings, **options)).cache)
    assert cached[0].seconds > 0 == cached[1].seconds
    own = {path.name.partition("_")[0] for path in tmp_path.glob("*.safetensors") if "_texts_" not in path.name}
    assert len(own) == 1 and own < cached[0].lasting


def test_patches_and_parameters_of_scores(tmp_path, monkeypatch):
    scores = ["gl_mcm", "gl_mcm(local_weight=0)", "mcm", "mcm(temperature=0.01)"]
    first = validate(EvaluationModule(random_siglip(), scores=scores, cache=str(tmp_path)))
    records = first.records["concepts"]
    assert torch.equal(records["gl_mcm(local_weight=0)"], records["mcm"])
    assert (records["gl_mcm"] > records["mcm"]).all()
    assert set(scores) == {r.score for r in first.rows if r.role == "near_ood"}
    scored = {s.name for s in first.eval_sets if s.role in ("id", "near_ood", "far_ood")}
    assert {name for name, columns in first.records.items() if "gl_mcm" in columns} == scored
    assert (
        len(list(tmp_path.glob("*_patches_*"))) == len(scored) < len(first.records)
    )  # no patches of what no score is for
    again = EvaluationModule(random_siglip(), scores=scores, cache=str(tmp_path))
    monkeypatch.setattr(again.vlm.model.visual.trunk, "forward_features", None)  # never called: all is in the cache
    assert values(validate(again)) == values(first)


def test_damaged_cache_is_replaced(tmp_path):
    first = validate(EvaluationModule("vit_clean", cache=str(tmp_path)))
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    assert values(validate(EvaluationModule("vit_clean", cache=str(tmp_path)))) == values(first)


def test_digest_tells_towers_apart_but_not_scopes():
    def digests(scope, bits, model="vit_clean"):
        module = validate(
            EvaluationModule(model, quant=Quantization(method="minmax", scope=scope, weight_bits=bits), evaluators=[])
        )
        return [tower_digest(module.vlm, module.scheme, "minmax", tower) for tower in ("vision", "text")]

    alone, both = digests("vision", 4), digests("vision_text", 4)
    assert alone[0] == both[0] and alone[1] != both[1]
    assert alone[1] == tower_digest(load_vlm("vit_clean"), None, "fp32", "text")  # as it came
    assert len({alone[0], digests("vision", 8)[0], digests("vision", 4, "align_clean")[0]}) == 3


def test_qat_lowers_its_loss_files_results_and_reloads(tmp_path):
    seed_everything(0, verbose=False)
    module = QATModule(
        "vit_clean", quant=Quantization(method="lsq_contrastive", scope="vision", weight_bits=4, act_bits=8)
    )
    writer = ResultsWriter(root=str(tmp_path), run_id="qat")
    fit = trainer(max_epochs=3, check_val_every_n_epoch=3, callbacks=[SingularValueSpectrum(), writer])
    data = EmbeddedData(**SMALL_DATA)

    def distance():
        with torch.no_grad():
            return float(
                module.method.loss(
                    module.vlm.encode_image(data.pairs.images),
                    module.teacher_text,
                    module.teacher_image,
                    module.teacher_text,
                    module.reference.logit_scale(),
                )
            )

    before = []
    original = module.on_fit_start
    module.on_fit_start = lambda: (original(), before.append(distance()))
    fit.fit(module, data)
    module.vlm.eval()
    assert distance() < before[0]
    (teacher,) = (tmp_path / "cache").glob("*_pairs_*")  # which other fits of the model find there
    assert torch.equal(load_file(teacher)["features"], module.teacher_image)
    about = {"precision": "32-true", "world_size": 1, "strategy": SimpleNamespace(root_device=torch.device("cpu"))}
    taken = {Computation.of(SimpleNamespace(datamodule=EmbeddedData(train_batch_size=n), **about)) for n in (32, 125)}
    assert (
        len(taken) == 1
    )  # fits and validations share full precision's images, whatever number of pairs they take at once

    store = ResultsStore(tmp_path)
    rows = store.rows(["qat"])
    assert store.source("qat") == "embedded"
    assert set(rows["method"]) == {"lsq_contrastive"} and {"stable_rank", "agreement"} <= set(rows["metric"])
    assert len(store.curves("qat")) > 0 and len(store.samples("qat")) == sum(len(s.images) for s in data.eval_sets)

    loaded = validate(EvaluationModule("vit_clean", checkpoint=str(tmp_path / "models" / "qat")))
    for name, columns in module.records.items():
        assert torch.equal(columns["confidence"], loaded.records[name]["confidence"])
    assert loaded.run_key == module.run_key


class TestBadInput:
    def test_unknown_and_out_of_range(self):
        for settings, word in (
            ({"method": "minmx"}, "minmax"),
            ({"method": "minmax", "weight_bits": 0}, "weight_bits"),
            ({"method": "minmax", "act_bits": 17}, "act_bits"),
            ({"method": "minmax", "scope": "visoin"}, "vision"),
        ):
            with pytest.raises(VLMQError, match=word):
                Quantization(**settings)
        with pytest.raises(VLMQError, match="energy"):
            EvaluationModule("vit_clean", scores=["enrgy"])

    def test_training_methods_are_not_validated_untrained(self):
        with pytest.raises(VLMQError, match="vlmq fit"):
            validate(EvaluationModule("vit_clean", quant=Quantization(method="lsq_contrastive")))

    def test_post_training_methods_are_not_trained(self):
        with pytest.raises(VLMQError, match="nothing to train"):
            QATModule("vit_clean", quant=Quantization(method="minmax"))

    def test_missing_quantized_checkpoint(self, tmp_path):
        with pytest.raises(VLMQError, match=r"quant\.json"):
            validate(EvaluationModule("vit_clean", checkpoint=str(tmp_path)))

    def test_padding_sampler_is_noticed(self):
        data = EmbeddedData(**SMALL_DATA)
        data.setup()
        module = EvaluationModule("vit_clean")
        data.eval_sets  # noqa: B018 - built before the sampler is replaced
        loaders = data.val_dataloader

        def padded():
            from torch.utils.data import DataLoader, DistributedSampler

            return [
                DataLoader(lo.dataset, 50, sampler=DistributedSampler(lo.dataset, 2, 0), collate_fn=lambda b: b)
                for lo in loaders()
            ]

        data.val_dataloader = padded
        with pytest.raises(VLMQError, match="use_distributed_sampler"):
            trainer().validate(module, data, verbose=False)


@pytest.mark.parametrize(("norm", "what"), [("visual.ln_post", "images"), ("ln_final", "classes")])
def test_features_that_are_all_alike_are_told(caplog, norm, what):
    vlm = load_vlm("vit_clean")
    layer = vlm.model.get_submodule(norm)
    with torch.no_grad():  # finite, of unit length after normalising, and the same whatever goes in
        layer.weight.zero_()
        layer.bias.copy_(torch.randn(len(layer.bias), generator=torch.Generator().manual_seed(0)))
    module = validate(EvaluationModule(vlm))
    (said,) = [r.getMessage() for r in caplog.records if "one and the same feature" in r.getMessage()]
    n = len(module.eval_sets)
    assert said.startswith(f"'vit_clean': all {what} have one and the same feature on {n} of {n} data sets (")


def test_a_sound_model_is_not_called_collapsed(quantized, caplog):
    validate(EvaluationModule("vit_clean"))
    assert "one and the same feature" not in caplog.text
