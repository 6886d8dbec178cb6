"""Reliability diagrams from a real validation, read back with TensorBoard's own reader."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from sklearn.calibration import calibration_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_vlmq.callbacks import ReliabilityDiagrams
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import calibration_error, reliability_bins, trajectory_bins
from lightning_vlmq.plotting.reliability import ReliabilityPanel, reliability_diagram, trajectory_diagram


def sample_records(n=300, sharpness=1.5):
    confidence = torch.rand(n)
    return {"confidence": confidence, "correct": torch.rand(n) < confidence**sharpness}


class RecordingModule(LightningModule):
    def __init__(self, records, reference_records, roles, tuned_records=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.eval_sets = [SimpleNamespace(name=name, role=role) for name, role in roles.items()]
        self.reference_records = reference_records
        self.tuned_records = tuned_records
        self._made = records
        self.records = None

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        return None

    def on_validation_epoch_end(self):
        self.records = self._made

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.zeros(4, 1))

    val_dataloader = test_dataloader = train_dataloader


def trainer(tmp_path, callback):
    return Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version="run"),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_steps=4,
    )


def images(tmp_path):
    read = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    return {tag: read.Images(tag) for tag in read.Tags()["images"]}


ROLES = {"clean": "id", "sketch": "shift", "counter": "spurious", "noise-3": "corruption", "digits": "far_ood"}


def test_one_figure_per_labelled_uncorrupted_set(tmp_path):
    records = {name: sample_records() for name in ROLES}
    reference = {name: sample_records() for name in ROLES}
    module = RecordingModule(records, reference, ROLES)
    trainer(tmp_path, ReliabilityDiagrams()).validate(module, verbose=False)
    drawn = images(tmp_path)
    names = ("clean", "sketch", "counter")
    assert set(drawn) == {f"{kind}/{name}" for kind in ("reliability", "reliability_trajectory") for name in names}
    for tag, (event,) in drawn.items():
        image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert image.std() > 10
        assert (event.width > event.height) == tag.startswith("reliability/")  # two columns


def test_one_column_without_reference_and_the_step_of_the_fit(tmp_path):
    module = RecordingModule({"clean": sample_records()}, None, {"clean": "id"})
    trainer(tmp_path, ReliabilityDiagrams()).fit(module)
    (event,) = images(tmp_path)["reliability/clean"]  # none from the sanity check
    assert event.step == 4
    paired = RecordingModule({"clean": sample_records()}, {"clean": sample_records()}, {"clean": "id"})
    trainer(tmp_path / "paired", ReliabilityDiagrams()).validate(paired, verbose=False)
    assert images(tmp_path / "paired")["reliability/clean"][0].width > event.width


def test_a_test_run_draws_too(tmp_path):
    module = RecordingModule({"clean": sample_records()}, None, {"clean": "id"})
    trainer(tmp_path, ReliabilityDiagrams()).test(module, verbose=False)
    assert set(images(tmp_path)) == {"reliability/clean"}


def test_a_tuned_model_has_a_column_of_its_own(tmp_path):
    widths, heights = [], []
    for number, tuned in enumerate((None, {"clean": sample_records()})):
        module = RecordingModule({"clean": sample_records()}, {"clean": sample_records()}, {"clean": "id"}, tuned)
        trainer(tmp_path / str(number), ReliabilityDiagrams()).validate(module, verbose=False)
        (event,) = images(tmp_path / str(number))["reliability/clean"]
        widths.append(event.width)
        heights.append(event.height)
    assert widths[1] > 1.3 * widths[0] and heights[0] == heights[1]


def test_trajectories_follow_the_images_of_each_bin():
    first, second, third = sample_records(400), sample_records(400), sample_records(400)
    columns = (torch.stack([r[c] for r in (first, second, third)]) for c in ("confidence", "correct"))
    axes = trajectory_diagram(trajectory_bins(*columns, 5), ["FP32", "quantized", "tuned"], "title").axes[0]
    bins = np.digitize(first["confidence"].double(), np.linspace(0, 1, 6)) - 1
    for marks, records in zip(axes.collections, (first, second, third), strict=True):
        for number, (x, y) in enumerate(marks.get_offsets()):
            own = bins == number
            assert x == pytest.approx(records["confidence"].double()[own].mean().item())
            assert y == pytest.approx(records["correct"].double()[own].mean().item())
    _, *paths = axes.lines
    assert len(paths) == 5
    np.testing.assert_allclose(paths[2].get_xdata(), [marks.get_offsets()[2][0] for marks in axes.collections])


def test_diagram_draws_what_scikit_learn_computes():
    records = sample_records(500)
    confidence, correct = records["confidence"], records["correct"]
    panel = ReliabilityPanel(
        "FP32", reliability_bins(confidence, correct, 10), float(calibration_error(confidence, correct, 10))
    )
    figure = reliability_diagram([panel], "title")
    accuracy, mean_confidence = calibration_curve(correct.numpy(), confidence.numpy(), n_bins=10)
    bars, gaps = figure.axes[0].patches
    np.testing.assert_allclose(bars.get_data().values, accuracy, rtol=1e-6)
    np.testing.assert_allclose(gaps.get_data().values, mean_confidence, rtol=1e-6)
    np.testing.assert_allclose(gaps.get_data().baseline, accuracy, rtol=1e-6)
    share = np.histogram(confidence.numpy(), 10, (0, 1))[0] / 500
    np.testing.assert_allclose(figure.axes[1].patches[0].get_data().values, share)
    ece = (share * np.abs(accuracy - mean_confidence)).sum()
    assert figure.axes[0].get_title() == f"FP32: ECE {ece:.1%}"


def test_one_sample_and_one_bin_are_drawn(tmp_path):
    one = {"confidence": torch.tensor([1.0]), "correct": torch.tensor([False])}
    module = RecordingModule({"clean": one}, None, {"clean": "id"})
    trainer(tmp_path, ReliabilityDiagrams(n_bins=1)).validate(module, verbose=False)
    assert set(images(tmp_path)) == {"reliability/clean"}


def test_bad_use_is_refused(tmp_path):
    with pytest.raises(VLMQError, match="n_bins"):
        ReliabilityDiagrams(n_bins=0)
    with pytest.raises(VLMQError, match="no per-sample records"):
        trainer(tmp_path, ReliabilityDiagrams()).validate(RecordingModule(None, None, {}), verbose=False)
    empty = RecordingModule({"clean": sample_records(0)}, None, {"clean": "id"})
    with pytest.raises(VLMQError, match="'clean' has no samples"):
        trainer(tmp_path, ReliabilityDiagrams()).validate(empty, verbose=False)
