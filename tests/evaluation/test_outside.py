"""A score and a metric from outside the package: one registration each, and they are in rows and in the report."""

import numpy as np
import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything

from lightning_vlmq.callbacks import ResultsWriter
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.evaluation.measures import METRICS, Measure, Metric
from lightning_vlmq.evaluation.quantities import Ranked, SampleMean
from lightning_vlmq.metrics import OOD_SCORES, ScoreInputs
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.page import build_report


@pytest.fixture
def registered():
    """Of the pairs' features, and of the cosines: a score each; a mean and a ranking metric. Taken out again afterwards."""

    @OOD_SCORES.register("nearest_pair", needs={"features", "calibration_features"})
    def nearest_pair(inputs: ScoreInputs) -> torch.Tensor:
        return (inputs.features @ inputs.calibration_features.T).amax(-1)

    @OOD_SCORES.register("margin", needs={"cosine"})
    def margin(inputs: ScoreInputs, power: float = 1.0) -> torch.Tensor:
        first, second = inputs.cosine.topk(2).values.unbind(-1)
        return (first - second) ** power

    doubt = SampleMean(lambda r: 1 - r["confidence"])
    METRICS.register("doubt")(Metric("doubt of ours", False, doubt))
    middle = Ranked(lambda c, s: c["confidence"].quantile(0.5, dim=-1), names=("confidence",))
    METRICS.register("median_confidence")(Metric("median confidence", True, middle, is_relative=False))
    yield
    for registry, names in ((OOD_SCORES, ("nearest_pair", "margin")), (METRICS, ("doubt", "median_confidence"))):
        for name in names:
            del registry._entries[name]


def test_they_are_in_rows_and_report(registered, tmp_path):
    for run_id, quant in (("full", Quantization()), ("w3", Quantization(method="minmax", weight_bits=3))):
        seed_everything(0, verbose=False)
        scores = ["mcm", "nearest_pair", "margin(power=2)"]
        module = EvaluationModule("vit_clean", quant=quant, scores=scores, lst=True)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            use_distributed_sampler=False,
            callbacks=[ResultsWriter(str(tmp_path), run_id)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.validate(module, EmbeddedData(**{**SMALL_DATA, "datasets": ["concepts", "unseen"]}), verbose=False)
    rows = ResultsStore(tmp_path).rows(["w3"])
    own = rows[rows["dataset"] == "concepts"].set_index("metric")
    confidence = module.records["concepts"]["confidence"]
    assert own.loc["doubt", "value"] == pytest.approx(1 - float(confidence.double().mean()))
    assert own.loc["median_confidence", "value"] == pytest.approx(float(confidence.quantile(0.5)))
    assert own.loc[["doubt", "delta_doubt", "median_confidence", "delta_median_confidence"], "stderr"].gt(0).all()
    assert {"nearest_pair", "margin(power=2)"} <= set(rows.loc[rows["metric"] == "auroc", "score"])

    analysis = analyse(StudyResults.load(tmp_path))
    setting = Setting("minmax", 3, 8, "vision")
    for metric in ("doubt", "median_confidence"):
        assert 0 <= analysis.comparisons["vit_clean", setting, Measure(metric, "id")].q_value <= 1
    for score in ("nearest_pair", "margin(power=2)"):
        measure = Measure("auroc", "near_ood", "novel", score)
        assert np.isfinite(analysis.comparisons["vit_clean", setting, measure].value)
        # neither needs the logits: another logit scale gives no further hypothesis
        assert ("vit_clean", setting.tuned, measure) not in analysis.comparisons
    page = build_report(tmp_path).read_text()
    for text in ("doubt of ours", "median confidence", "nearest_pair", "margin(power=2)"):
        assert text in page


def test_a_score_says_what_it_reads(registered):
    with pytest.raises(VLMQError, match="unknown input of a score 'featurs'"):
        OOD_SCORES.register("misspelt", needs={"featurs"})
    inputs = ScoreInputs(torch.rand(3, 4), torch.rand(3, 4))
    with pytest.raises(VLMQError, match="'nearest_pair' needs calibration_features and features"):
        OOD_SCORES["nearest_pair"](inputs)

    @OOD_SCORES.register("liar", needs={"cosine"})
    def liar(inputs):
        return inputs.logits.amax(-1)

    try:
        with pytest.raises(VLMQError, match="'liar' reads logits: declare it"):
            OOD_SCORES["liar"](inputs)
    finally:
        del OOD_SCORES._entries["liar"]
