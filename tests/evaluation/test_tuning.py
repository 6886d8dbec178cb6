"""Logit scale tuning inside an evaluation: what it changes, what it leaves alone, and where it is filed."""

import math

import numpy as np
import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from lightning_vlmq.callbacks import ResultsWriter
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data import EmbeddedData, TensorImages
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.evaluation.tuning import PairFeatures, tune_logit_scale
from lightning_vlmq.metrics import LogitScale, fit_logit_scale
from lightning_vlmq.models import load_vlm
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.results.store import ResultsStore

SMALL = {**SMALL_DATA, "datasets": ["concepts", "unseen", "backgrounds"]}


class Pairs(EmbeddedData):
    """Some captions tell two images each."""

    def setup(self, stage=None):
        super().setup(stage)
        captions = list(self.pairs.columns["caption"])
        captions[1:40:2] = captions[0:40:2]
        self.pairs = TensorImages(self.pairs.images, caption=captions)


def random_siglip():
    torch.manual_seed(0)
    return load_vlm("siglip_clean", "none")


def underconfident():
    """A model whose scale is a quarter of what it was trained to."""
    vlm = load_vlm("vit_clean")
    with torch.no_grad():
        vlm.model.logit_scale -= math.log(4)
    return vlm


def validate(module, *callbacks, data=None):
    seed_everything(0, verbose=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", logger=False, use_distributed_sampler=False, callbacks=list(callbacks), **quiet
    )
    trainer.validate(module, data or Pairs(**SMALL), verbose=False)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def tuned(root):
    quant = Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
    return validate(EvaluationModule(underconfident(), quant=quant, lst=True), ResultsWriter(str(root), "run"))


def values(rows):
    return {(r.dataset, r.score, r.metric): r.value for r in rows}


def test_the_scale_is_the_most_likely_one_for_the_calibration_pairs(tuned):
    pairs = tuned.data.pairs
    with torch.no_grad():
        images = torch.cat([tuned.vlm.encode_image(part) for part in pairs.images.split(250)])
        texts = torch.cat([tuned.vlm.encode_text(tuned.vlm.tokenize(pairs.columns["caption"]))])
    cosine = (images.double() @ texts.double().T).numpy()
    captions = np.array(pairs.columns["caption"])
    right = captions[:, None] == captions[None]
    assert right.sum() > len(captions)  # some captions are there several times

    def nll(log_scale):
        logits = math.exp(log_scale) * cosine
        kept = np.where(right, logits, -np.inf)
        return sum((logsumexp(logits, axis) - logsumexp(kept, axis)).mean() for axis in (0, 1)) / 2

    best = minimize_scalar(nll, bounds=(1, 5), method="bounded", options={"xatol": 1e-8})
    scale = values(tuned.tuned_rows)["concepts", "", "logit_scale"]
    assert math.log(scale) == pytest.approx(best.x, abs=1e-4)
    assert values(tuned.rows)["concepts", "", "logit_scale"] == pytest.approx(float(tuned.vlm.logit_scale().detach()))


def test_predictions_stay_and_confidences_follow_the_scale(tuned):
    scale = values(tuned.tuned_rows)["concepts", "", "logit_scale"]
    data, vlm = tuned.data, tuned.vlm
    with torch.no_grad():
        for s in data.eval_sets:
            classes = vlm.class_features(s.class_names or data.class_names, data.templates)
            before, after = tuned.records[s.name], tuned.tuned_records[s.name]
            scores = {"mcm", "energy"} if ROLES[s.role].is_scored else set()
            assert {"mcm", "energy"} & before.keys() == {"mcm", "energy"} & after.keys() == scores
            for column in ("index", "target", "prediction", "correct", *(scores - {"energy"})):
                assert torch.equal(before[column], after[column])
            logits = scale * vlm.encode_image(s.images.images) @ classes.T
            torch.testing.assert_close(after["confidence"], logits.softmax(-1).amax(-1))
            if scores:
                torch.testing.assert_close(after["energy"], logits.logsumexp(-1))


def test_rows_are_those_of_the_tuned_records(tuned):
    before, after = values(tuned.rows), values(tuned.tuned_rows)
    of_the_model = (
        "coverage_weights",
        "coverage_macs",
        "bits_per_weight",
        "clipped_layers",
        "output_sqnr_db",
    )  # a scale changes none of these
    assert {key for key in before if key not in after} == {("concepts", "", metric) for metric in of_the_model}
    for key, value in after.items():
        scores = ("mcm", "maxlogit")
        unchanged = key[2] in ("top1", "top5", "agreement", "flips", "rsg", "vuln_add") or key[1] in scores
        if unchanged:
            assert value == pytest.approx(before[key], abs=1e-12, nan_ok=True), key
    assert after["concepts", "", "ece"] < 0.5 * before["concepts", "", "ece"]  # far underconfident
    inside, outside = (tuned.tuned_records[name]["energy"].numpy() for name in ("concepts", "novel"))
    labels = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    auroc = roc_auc_score(labels, np.r_[inside, outside])
    assert after["novel", "energy", "auroc"] == pytest.approx(auroc)
    full = tuned.reference_records["concepts"]["nll"].double().mean().item()  # compared with the scale it came with
    assert after["concepts", "", "delta_nll"] == pytest.approx((full - after["concepts", "", "nll"]) / full)
    assert "lst/id/ece" in tuned.trainer.callback_metrics


def test_it_is_filed_as_a_run_of_its_own(tuned, root):
    store = ResultsStore(root)
    assert store.run_ids() == ["run", "run.lst"]
    rows = store.rows(["run.lst"])
    assert set(rows["method"]) == {"minmax"} and rows["is_tuned"].all() and not store.rows(["run"])["is_tuned"].any()
    assert set(rows["scope"]) == {"vision_text"} and set(rows["weight_bits"]) == {4}
    samples, before = store.samples("run.lst"), store.samples("run")
    assert (samples["prediction"] == before["prediction"]).all()
    assert not (samples["confidence"] == before["confidence"]).all()


def test_the_second_run_encodes_nothing(tuned, root, monkeypatch):
    monkeypatch.setattr(FeatureCache, "put", lambda *_: pytest.fail("a tower was run again"))
    again = validate(
        EvaluationModule(underconfident(), quant=tuned.quant, lst=True, cache=str(root / "cache"), evaluators=[])
    )
    key = ("concepts", "", "logit_scale")
    assert values(again.tuned_rows)[key] == values(tuned.tuned_rows)[key]


def test_sigmoid_models_keep_their_bias_and_classify_by_softmax():
    module = validate(EvaluationModule(random_siglip(), lst=True, evaluators=[]))
    before, after = values(module.rows), values(module.tuned_rows)
    assert before["concepts", "", "logit_bias"] == pytest.approx(float(module.vlm.logit_bias().detach()))
    assert after["concepts", "", "logit_bias"] == before["concepts", "", "logit_bias"]
    assert after["concepts", "", "logit_scale"] != before["concepts", "", "logit_scale"]
    data, vlm, s = module.data, module.vlm, module.eval_sets[0]
    with torch.no_grad():
        cosine = vlm.encode_image(s.images.images) @ vlm.class_features(data.class_names, data.templates).T
    softmax = (float(vlm.logit_scale().detach()) * cosine).softmax(-1).amax(-1)  # which no bias changes
    torch.testing.assert_close(module.records[s.name]["confidence"], softmax)


def held_out_nll(features, scale_of):
    """Five folds of captions written out: NLL of each fold's pairs, summed over pairs, with a scale from the others."""
    total = 0.0
    for fold in range(5):
        own = features.caption % 5 == fold
        scale = scale_of(~own)
        logits = scale * (features.images[own].double() @ features.texts[features.caption[own]].double().T).numpy()
        right = (features.caption[own][:, None] == features.caption[own][None]).numpy()
        kept = np.where(right, logits, -np.inf)
        total += sum((logsumexp(logits, axis) - logsumexp(kept, axis)).sum() for axis in (0, 1)) / 2
    return total / len(features.caption)


def test_the_likelihood_of_held_out_pairs_is_told_before_and_after(tuned):
    before, after = (values(rows)["concepts", "", "pairs_nll"] for rows in (tuned.rows, tuned.tuned_rows))
    vlm, pairs = tuned.vlm, tuned.data.pairs
    with torch.no_grad():
        images = torch.cat([vlm.encode_image(part) for part in pairs.images.split(250)])
        captions = list(dict.fromkeys(pairs.columns["caption"]))
        texts = vlm.encode_text(vlm.tokenize(captions))
    features = PairFeatures(images, texts, torch.tensor([captions.index(c) for c in pairs.columns["caption"]]))
    own = float(vlm.logit_scale().detach())

    def fitted(rows):
        return fit_logit_scale(images[rows], texts, features.caption[rows], LogitScale(own)).scale

    assert before == pytest.approx(held_out_nll(features, lambda rows: own), rel=1e-4)
    assert after == pytest.approx(held_out_nll(features, fitted), rel=1e-4)
    assert after < before  # it is far underconfident


def test_a_scale_that_does_not_carry_over_is_warned_of(caplog):
    vlm, axes = load_vlm("vit_clean"), torch.eye(4)
    found = tune_logit_scale(vlm, PairFeatures(axes[[0, 3, 2, 1]], axes, torch.arange(4)))  # one fold right, one wrong
    assert found.nll_after > found.nll_before and "less likely: NLL" in caplog.text
    caplog.clear()
    found = tune_logit_scale(vlm, PairFeatures(axes[:3], axes[:3], torch.arange(3)))  # too few captions to hold two out
    assert math.isnan(found.nll_before) and math.isnan(found.nll_after) and not caplog.text


def test_without_pairs_it_says_what_to_do():
    class NoPairs(EmbeddedData):
        def setup(self, stage=None):
            super().setup(stage)
            self.pairs = None

    with pytest.raises(VLMQError, match="no caption pairs"):
        validate(EvaluationModule("vit_clean", lst=True), data=NoPairs(**SMALL))


def test_scores_that_compare_with_the_pairs_have_them():
    module = validate(EvaluationModule("vit_clean", scores=["knn", "mahalanobis"], evaluators=[]))
    pairs, held_out = module.data.pairs.images, module.eval_sets[1]
    with torch.no_grad():
        reference = torch.cat([module.vlm.encode_image(part) for part in pairs.split(250)])
        distance = torch.cdist(module.vlm.encode_image(held_out.images.images), reference)
    expected = -distance.sort(-1).values[:, 49]
    torch.testing.assert_close(module.records["novel"]["knn"], expected, atol=1e-4, rtol=0)
    assert module.records["novel"]["mahalanobis"].isfinite().all()
