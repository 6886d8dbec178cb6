"""The callback in a real trainer, its event files read back with TensorBoard's own reader."""

import copy
import io

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_vlmq.callbacks import SingularValueSpectrum, spectrum
from lightning_vlmq.callbacks.spectrum import shared_weight_spectra
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.features import FeatureCache


class RoundedLinear(nn.Linear):
    """A quantized layer: its effective weight is the stored one on a grid of 1/8."""

    def effective_weight(self):
        return (self.weight * 8).round() / 8


class TinyVLM(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.visual = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(3, 6, 2),
                "0": nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": linear(6, 6), "k_proj": linear(6, 6)})}),
                "1": nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": linear(6, 6)}), "mlp": linear(6, 12)}),
            }
        )
        self.text_projection = linear(4, 6)

    def tower_of(self, name):
        return "vision" if name.startswith("visual") else "text"


def one_layer():
    """A model that is drawn quickly, for tests of when records are made."""
    vlm = TinyVLM()
    vlm.visual = None
    return vlm


class TinyModule(LightningModule):
    def __init__(self, vlm, reference=None):
        super().__init__()
        self.vlm = vlm
        self.__dict__["reference"] = reference  # not a submodule: it is not trained

    def training_step(self, batch, batch_idx):
        return self.vlm.text_projection.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return DataLoader(torch.zeros(16, 1), batch_size=1)

    test_step = validation_step
    val_dataloader = test_dataloader = train_dataloader


def quantized_and_reference():
    reference = TinyVLM()
    quantized = TinyVLM(RoundedLinear)
    quantized.load_state_dict(reference.state_dict())
    return quantized, reference


def trainer(tmp_path, callback, **options):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    defaults = {
        "logger": [CSVLogger(tmp_path, name="csv"), logger],
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
        "max_steps": 6,
    }
    return Trainer(
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{**defaults, **options},
    )


def events(tmp_path):
    accumulator = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def sigma(weight):
    return np.linalg.svd(weight.detach().flatten(1).double().numpy(), compute_uv=False)


def test_validation_writes_figures_and_scalars_of_effective_weights(tmp_path):
    quantized, reference = quantized_and_reference()
    callback = SingularValueSpectrum(top_ranks=(2, 4))
    trainer(tmp_path, callback).validate(TinyModule(quantized, reference), verbose=False)

    read = events(tmp_path)
    groups = {"vision_conv", "vision_attention", "vision_mlp", "text_projection"}
    figures = {f"singular_values/{name}" for name in groups | {"log_ratio"}}
    assert set(read.Tags()["images"]) == figures
    for tag in figures:
        (event,) = read.Images(tag)
        image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert event.step == 0
        assert image.shape[0] > 150 and image.shape[1] > 300
        assert image.std() > 10  # something is drawn

    attention = [layer for name, layer in quantized.named_modules() if name.endswith("_proj")]
    values = [sigma(layer.effective_weight()) for layer in attention]
    expected = {
        "stable_rank": [(s**2).sum() / s[0] ** 2 for s in values],
        "effective_rank": [np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()) for s in values],
        "top_energy": [(s[:2] ** 2).sum() / (s**2).sum() for s in values],
        "top_energy_4": [(s[:4] ** 2).sum() / (s**2).sum() for s in values],
    }
    assert not read.Tags()["scalars"]  # one point is no curve: these are in the results store
    for metric, per_layer in expected.items():
        assert callback.rows()["vision/attention"][metric] == pytest.approx(np.mean(per_layer), rel=1e-4)


def test_scalars_of_groups_are_curves_of_a_fit_and_those_of_layers_on_request(tmp_path):
    for wanted in (False, True):
        callback = SingularValueSpectrum(every_n_steps=3, layer_scalars=wanted)
        trainer(tmp_path / str(wanted), callback).fit(TinyModule(*quantized_and_reference()))
        read = events(tmp_path / str(wanted))
        scalars = read.Scalars("spectrum/vision_attention/stable_rank")
        assert [event.step for event in scalars] == [0, 3, 6]
        assert scalars[-1].value == pytest.approx(callback.rows()["vision/attention"]["stable_rank"], rel=1e-4)
        layers = [tag for tag in read.Tags()["scalars"] if tag.startswith("spectrum_layers/")]
        assert bool(layers) == wanted


def test_a_test_run_records_too(tmp_path):
    callback = SingularValueSpectrum()
    trainer(tmp_path, callback).test(TinyModule(*quantized_and_reference()), verbose=False)
    assert len(callback.curves()) == 34
    assert len(events(tmp_path).Images("singular_values/log_ratio")) == 1


def test_curves_hold_quantized_beside_reference(tmp_path):
    quantized, reference = quantized_and_reference()
    callback = SingularValueSpectrum()
    trainer(tmp_path, callback, logger=False).validate(TinyModule(quantized, reference), verbose=False)
    curves = callback.curves()
    assert list(curves.columns) == ["kind", "layer", "group", "x", "y", "y_reference"]
    assert set(curves["kind"]) == {"singular_values"}
    layer = curves[curves["layer"] == "visual.1.mlp"]
    assert set(layer["group"]) == {"vision/mlp"}
    assert layer["x"].tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(layer["y"], sigma(quantized.visual["1"]["mlp"].effective_weight()), rtol=1e-4)
    np.testing.assert_allclose(layer["y_reference"], sigma(reference.visual["1"]["mlp"].weight), rtol=1e-4)
    assert len(curves) == 6 + 6 + 6 + 6 + 6 + 4


def test_fit_records_start_every_n_steps_and_validation_once_each(tmp_path):
    callback = SingularValueSpectrum(every_n_steps=2)
    module = TinyModule(TinyVLM())
    before = copy.deepcopy(module.vlm)
    run = trainer(tmp_path, callback, max_steps=7, val_check_interval=3)
    run.fit(module)
    read = events(tmp_path)
    steps = [0, 2, 3, 4, 6]  # validations at 3 and 6; the sanity check writes nothing of its own
    for tag in ("singular_values/text_projection", "singular_values/log_ratio"):
        assert [event.step for event in read.Images(tag)] == steps
    scalars = read.Scalars("spectrum/text_projection/top_energy")
    assert [event.step for event in scalars] == steps

    curves = callback.curves().set_index("layer")
    projection = curves.loc["text_projection"]
    np.testing.assert_allclose(projection["y_reference"], sigma(before.text_projection.weight), rtol=1e-4)
    assert (projection["y"] < projection["y_reference"]).all()  # the loss shrinks it
    untrained = curves.loc["visual.conv1"]
    np.testing.assert_array_equal(untrained["y"], untrained["y_reference"])

    run.validate(module, verbose=False)  # alone, after the fit: nothing to compare with, and still computed
    assert callback.curves()["y_reference"].isna().all()


def test_the_image_slider_shows_training(tmp_path):
    trainer(tmp_path, SingularValueSpectrum(every_n_steps=2), limit_val_batches=0, max_steps=4).fit(
        TinyModule(one_layer())
    )
    images = [event.encoded_image_string for event in events(tmp_path).Images("singular_values/text_projection")]
    assert len(images) == len(set(images)) == 3


def test_accumulated_batches_do_not_record_a_step_twice(tmp_path):
    callback = SingularValueSpectrum(every_n_steps=1)
    trainer(tmp_path, callback, max_steps=3, accumulate_grad_batches=4, limit_val_batches=0).fit(
        TinyModule(one_layer())
    )
    recorded = [event.step for event in events(tmp_path).Scalars("spectrum/text_projection/stable_rank")]
    assert recorded == [0, 1, 2, 3]


def test_zero_steps_leave_start_and_validations(tmp_path):
    callback = SingularValueSpectrum(every_n_steps=0)
    trainer(tmp_path, callback, val_check_interval=3).fit(TinyModule(one_layer()))
    recorded = [event.step for event in events(tmp_path).Scalars("spectrum/text_projection/stable_rank")]
    assert recorded == [0, 3, 6]


def test_full_precision_is_decomposed_once_for_all_runs(tmp_path, monkeypatch):
    """A second run, with a callback of its own, finds the first one's spectra by the weights' content."""
    decomposed = []
    whole = spectrum.weight_spectra
    monkeypatch.setattr(spectrum, "weight_spectra", lambda w: decomposed.append(len(w)) or whole(w))
    quantized, reference = quantized_and_reference()
    found = []
    for _ in range(2):
        module, callback = TinyModule(quantized, reference), SingularValueSpectrum()
        module.__dict__["cache"] = FeatureCache(tmp_path / "cache")
        trainer(tmp_path, callback, logger=False).validate(module, verbose=False)
        found.append(callback.curves())
    assert decomposed == [6, 6, 6]  # both models, then the quantized one alone
    pd.testing.assert_frame_equal(*found)
    with torch.no_grad():
        reference.text_projection.weight.mul_(2)  # other weights are another entry
    module, callback = TinyModule(quantized, reference), SingularValueSpectrum()
    module.__dict__["cache"] = FeatureCache(tmp_path / "cache")
    trainer(tmp_path, callback, logger=False).validate(module, verbose=False)
    assert decomposed == [6] * 5
    mine, before = (c[c["layer"] == "text_projection"]["y_reference"].to_numpy() for c in (callback.curves(), found[0]))
    np.testing.assert_allclose(mine, 2 * before, rtol=1e-6)


def test_without_reference_there_is_no_ratio(tmp_path):
    callback = SingularValueSpectrum()
    trainer(tmp_path, callback).validate(TinyModule(TinyVLM()), verbose=False)
    assert "singular_values/log_ratio" not in events(tmp_path).Tags()["images"]
    assert callback.curves()["y_reference"].isna().all()


def test_layers_the_reference_lacks_are_left_uncompared(tmp_path):
    quantized, reference = quantized_and_reference()
    reference.text_projection = nn.Linear(2, 6)  # another number of singular values
    del reference.visual["conv1"]
    callback = SingularValueSpectrum()
    trainer(tmp_path, callback).validate(TinyModule(quantized, reference), verbose=False)
    missing = callback.curves().groupby("layer")["y_reference"].apply(lambda column: column.isna().all())
    assert set(missing.index[missing]) == {"text_projection", "visual.conv1"}


def test_a_changed_reference_is_noticed(tmp_path):
    quantized, reference = quantized_and_reference()
    callback, module = SingularValueSpectrum(), TinyModule(quantized, reference)
    run = trainer(tmp_path, callback, logger=False)
    run.validate(module, verbose=False)
    before = callback.curves()["y_reference"]
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(2)
    run.validate(module, verbose=False)
    np.testing.assert_allclose(callback.curves()["y_reference"], 2 * before, rtol=1e-5)


def test_half_precision_and_zero_weights(tmp_path):
    vlm = TinyVLM().bfloat16()
    nn.init.zeros_(vlm.text_projection.weight)
    callback = SingularValueSpectrum()
    trainer(tmp_path, callback).validate(TinyModule(vlm, copy.deepcopy(vlm)), verbose=False)
    assert callback.rows()["text/projection"] == {"stable_rank": 0.0, "effective_rank": 0.0, "top_energy": 0.0}


def test_diverged_weights_name_the_layer(tmp_path):
    vlm = TinyVLM()
    with torch.no_grad():
        vlm.visual["conv1"].weight[0] = torch.nan
    with pytest.raises(VLMQError, match=r"visual\.conv1"):
        trainer(tmp_path, SingularValueSpectrum()).validate(TinyModule(vlm), verbose=False)


def test_bad_use_is_refused(tmp_path):
    for arguments in ({"every_n_steps": -1}, {"top_ranks": ()}, {"top_ranks": (0,)}):
        with pytest.raises(VLMQError):
            SingularValueSpectrum(**arguments)
    with pytest.raises(VLMQError, match="no spectra yet"):
        SingularValueSpectrum().curves()
    with pytest.raises(VLMQError, match="no 'vlm'"):
        trainer(tmp_path, SingularValueSpectrum()).validate(TinyModule(None), verbose=False)
    with pytest.raises(VLMQError, match="no linear"):
        empty = TinyVLM()
        empty.visual, empty.text_projection = None, None
        trainer(tmp_path, SingularValueSpectrum()).validate(TinyModule(empty), verbose=False)


def _decompose(rank, size, folder, broken):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    torch.manual_seed(0)
    weights = {f"layer{k}": torch.randn(4 + k, 6) for k in range(5)}
    if broken:
        weights["layer3"][0, 0] = torch.nan
    try:
        found = {name: spectrum.singular_values for name, spectrum in shared_weight_spectra(weights).items()}
    except VLMQError as error:
        found = str(error)
    torch.save((found, weights), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("broken", [False, True])
def test_processes_share_the_layers_out(tmp_path, broken):
    torch.multiprocessing.spawn(_decompose, (2, tmp_path, broken), nprocs=2)
    for rank in range(2):
        found, weights = torch.load(tmp_path / f"{rank}.pt")
        if broken:
            assert "layer3" in found  # in both, not in the one that had it
            continue
        assert list(found) == list(weights)
        for name, values in found.items():
            np.testing.assert_allclose(values, sigma(weights[name]), rtol=1e-6)
