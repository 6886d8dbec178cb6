"""The callback on a quantized zoo model in a real trainer, its results read back from the store."""

import numpy as np
import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vlmq.callbacks import ActivationSpectrum, ResultsWriter, activations
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.plotting.activations import rank_curves, rank_maps
from lightning_vlmq.quant.blocks import KeptActivations, run_tower
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.spectral import SecondMoments, eigenbasis, rank_table

BANDS = [[0, 4], [4, None]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    seed_everything(0, verbose=False)
    quant = Quantization(method="minmax", scope="vision_text", weight_bits=4, act_bits=8)
    module, callback = EvaluationModule("vit_clean", quant=quant), ActivationSpectrum(20, BANDS)
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(root, name="", version="run"),
        callbacks=[callback, ResultsWriter(str(root), "run")],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module._log_hyperparams = False  # the command line logs them as plain values, not as a dataclass
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    return root, module, callback


def test_the_output_is_that_of_both_models_on_the_first_images(run):
    _, module, callback = run
    inside = next(s for s in module.eval_sets if s.role == "id")
    images = torch.stack([inside.images[k]["image"] for k in range(20)])
    moments = SecondMoments(callback.tables()["vision/output"].basis.shape[0])
    with torch.no_grad():
        moments.update(run_tower(module.reference, "vision", images), run_tower(module.vlm, "vision", images))
    mine, expected = callback.tables()["vision/output"], rank_table(moments)
    assert mine.n == 20
    torch.testing.assert_close(mine.sqnr_db[:8], expected.sqnr_db[:8], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(mine.gain[:8], expected.gain[:8], rtol=1e-3, atol=1e-4)


def test_curves_and_scalars_are_filed(run):
    root, _, callback = run
    store = ResultsStore(root)
    curves, rows = store.curves("run"), store.rows(["run"])
    sites = {"vision/block 0", "vision/output", "text/block 0", "text/output"}
    assert sites <= set(curves["layer"].astype(str))
    assert {"sqnr_db", "gain", "gain_stderr", "eigenvalues", "fourier_power"} == set(curves["kind"].astype(str))
    output = rows[rows["score"] == "vision/output"].set_index("metric")["value"]
    table = callback.tables()["vision/output"]
    assert output["mean_sqnr_db"] == pytest.approx(table.mean_sqnr_db)
    assert output["gain_0-4"] == pytest.approx(table.pooled(0, 4)[1])
    assert 0 <= output["leading_angle"] <= 90 and output["rankme"] > 1 < output["participation_ratio_full"]
    shares = rows[rows["metric"] == "low_frequency_share"]
    assert len(shares) >= 2 and shares["value"].between(0, 1).all()
    gains = curves[(curves["kind"] == "gain") & (curves["layer"] == "vision/output")].sort_values("x")
    np.testing.assert_allclose(gains["y"], table.gain)


def test_full_precision_is_computed_once(run, monkeypatch):
    """A second validation takes full precision's activations from memory, its eigenvectors from the run's folder, and says the same."""
    root, module, callback = run
    kept = list((root / "cache").glob("*_spectra_activations.safetensors"))
    assert len(kept) == len(callback.tables())
    rows, computed = callback.rows(), {tower: full.computed for tower, full in callback._full.items()}
    solved = []
    monkeypatch.setattr(activations, "eigenbasis", lambda moment: solved.append(moment) or eigenbasis(moment))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], use_distributed_sampler=False, **quiet)
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    assert len(solved) == len(callback.tables())  # the quantized model's alone
    assert {tower: full.computed for tower, full in callback._full.items()} == computed
    again = callback.rows()
    assert {s: pytest.approx(own, nan_ok=True) for s, own in rows.items()} == again


def test_kept_activations_are_of_these_inputs_and_no_more_than_allowed():
    made = []

    def compute(x):
        made.append(x)
        return {"site": x.float()}

    batches = [torch.full((3,), k) for k in range(3)]
    kept = KeptActivations(limit=2 * (24 + 12))  # two batches of three floats, and their inputs
    for _ in range(2):
        for place, x in enumerate(batches):
            found = kept.of(place, x, lambda x=x: compute(x))
            assert torch.equal(found["site"], x.float())
    assert len(made) == 4  # the third batch twice
    kept.of(0, batches[2], lambda: compute(batches[2]))
    assert len(made) == 5  # another batch in its place
    kept.of(1, batches[1], lambda: compute(batches[1]))
    assert len(made) == 6


def test_figures_reach_the_logger(run):
    root, _, _ = run
    tags = EventAccumulator(str(root / "run")).Reload().Tags()["images"]
    assert {f"activations/{kind}_{tower}" for kind in ("curves", "map") for tower in ("vision", "text")} <= set(tags)


def test_full_precision_has_nothing_to_compare():
    callback = ActivationSpectrum(4)
    module = EvaluationModule("vit_clean")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        limit_val_batches=1,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, EmbeddedData(datasets=["concepts"], n_concepts=8), verbose=False)
    assert callback.rows() == {} and callback.curves().empty


def test_figures_show_every_site():
    tables = {}
    for k in range(3):
        z = torch.randn(50, 6, dtype=torch.float64)
        moments = SecondMoments(6)
        moments.update(z, z + 0.1 * torch.randn_like(z))
        tables[f"vision/block {k}" if k < 2 else "vision/output"] = rank_table(moments)
    curves, maps = rank_curves(tables, "title"), rank_maps(tables, "title")
    drawn = [line.get_ydata() for line in curves.axes[0].lines]
    for line, table in zip(drawn, tables.values()):
        np.testing.assert_allclose(line, table.sqnr_db)
    assert maps.axes[0].images[0].get_array().shape == (3, 64)
    assert [label.get_text() for label in maps.axes[0].get_yticklabels()] == list(tables)
    low, high = maps.axes[2].images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1)  # white is not damped


@pytest.mark.parametrize("arguments", [{"n_images": 1}, {"bands": []}, {"bands": [[2, 2]]}, {"bands": [[None, 3]]}])
def test_bad_use_is_refused(arguments):
    with pytest.raises(VLMQError):
        ActivationSpectrum(**arguments)


def _decompose(rank, size, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    made, of = [], activations.SiteSpectra.of
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(activations.SiteSpectra, "of", lambda *given: made.append(given) or of(*given))
        found = activations.shared_site_spectra(_site_moments(), FeatureCache(folder / "cache"))
    torch.save(
        (len(made), list(found), {s: (own.table.gain, own.eigenvalues) for s, own in found.items()}),
        folder / f"{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def _site_moments():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for k in range(5):
        z = torch.randn(60, 4 + k % 3, generator=generator, dtype=torch.float64)
        found[f"vision/block {k}"] = SecondMoments(z.shape[1])
        found[f"vision/block {k}"].update(z, 0.9 * z + 0.1 * torch.randn(z.shape, generator=generator))
    return found


def test_processes_share_the_sites_out(tmp_path):
    torch.multiprocessing.spawn(_decompose, (2, tmp_path), nprocs=2)
    moments = _site_moments()
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sorted(made for made, _, _ in shares) == [2, 3]
    for _, sites, found in shares:  # both have all
        assert sites == list(moments)
        for site, own in moments.items():
            torch.testing.assert_close(found[site][0], rank_table(own).gain)
            torch.testing.assert_close(found[site][1], eigenbasis(own.quantized())[0])
