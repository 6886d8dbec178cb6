"""The best start: the least loss of all that were tried, and nothing left of the others."""

import pytest
import torch
from cases.quant import build, make_batches, shallow, twin

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.fits import Fit
from lightning_vlmq.quant.methods import find_method
from lightning_vlmq.quant.starting import keep_best
from lightning_vlmq.quant.training import QATMethod

GRIDS = ("minmax", "mse")


def mean_loss(student: VLM, full: VLM, method: QATMethod, batches: list[dict]) -> float:
    student.eval()
    with torch.no_grad():
        pairs = tuple(
            torch.cat([encode(b[column]) for b in batches])
            for encode, column in ((full.encode_image, "image"), (full.encode_text, "tokens"))
        )
        losses = [
            method.loss(
                student.encode_image(b["image"]),
                student.encode_text(b["tokens"]),
                full.encode_image(b["image"]),
                full.encode_text(b["tokens"]),
                full.logit_scale(),
                pairs,
            )
            for b in batches
        ]
    return float(torch.stack(losses).mean())


def grids(vlm: VLM, side: str) -> list[torch.Tensor]:
    return [getattr(layer, f"{side}_fake_quant").scale.detach().clone() for layer in quantized_layers(vlm).values()]


@pytest.mark.parametrize(("gain", "chosen"), [(0.05, "first"), (0.2, "second")])
def test_a_gain_within_the_margin_on_the_pairs_of_the_fits_changes_nothing(gain: float, chosen: str):
    """The loss is given: the second fit of weights has less of it, by so much."""
    vlm = twin(shallow(build("vit_clean")))
    batches = make_batches(vlm, (6,), seed=3)
    quantize(vlm, "minmax", QuantScheme(4, 8, scope="vision"), batches)
    layer = next(iter(quantized_layers(vlm).values()))
    fits = {"first": Fit(), "second": Fit()}
    for factor, fit in zip((1.0, 0.5), fits.values()):
        fit.keep(layer, factor * layer.weight)

    def loss(*_: object) -> torch.Tensor:
        return torch.tensor(1 - gain if layer.weight.abs().max() < half else 1.0)

    half = 0.75 * layer.weight.abs().max()
    scheme = QuantScheme(4, 8, scope="vision")
    assert keep_best(vlm, scheme, batches, loss, {"minmax": lambda: None}, lambda: fits) == ("minmax", chosen)
    assert (layer.weight.abs().max() < half) == (chosen == "second")


def test_the_best_start_has_the_least_loss_of_all_four_fits():
    full = shallow(build("vit_clean"))
    batches = make_batches(full, (6, 6), seed=3)
    scheme = QuantScheme(4, 4, scope="vision_text")
    made = {}
    for start in (*GRIDS, "best"):
        made[start] = twin(full)
        method = quantize(made[start], f"lsq_contrastive(start={start!r})", scheme, batches).method
    losses = {}
    for inputs in GRIDS:
        for weights in GRIDS:
            mixed = twin(made[weights])
            for own, other in zip(quantized_layers(mixed).values(), quantized_layers(made[inputs]).values()):
                own.act_fake_quant.set_qparams(other.act_fake_quant.scale.detach(), other.act_fake_quant.zero_point)
            losses[inputs, weights] = mean_loss(mixed, full, method, batches)
    inputs, weights = min(losses, key=losses.__getitem__)
    assert losses[inputs, weights] < 0.9 * losses["minmax", "minmax"], (
        "no other fit is better by a margin; take another seed"
    )
    assert len(set(losses.values())) == 4 and mean_loss(made["best"], full, method, batches) == min(losses.values())
    for side, name in (("act", inputs), ("weight", weights)):
        assert all(map(torch.equal, grids(made["best"], side), grids(made[name], side)))
    chosen = quantized_layers(made[weights]).items()
    assert all(torch.equal(layer.weight, quantized_layers(made["best"])[name].weight) for name, layer in chosen)
    clipped = {layer.act_fake_quant.clipping for layer in quantized_layers(made["best"]).values()}
    assert clipped == {layer.act_fake_quant.clipping for layer in quantized_layers(made[inputs]).values()}


def test_images_alone_and_weights_alone_are_enough_to_tell():
    full = shallow(build("vit_clean"))
    images = [{"image": batch["image"]} for batch in make_batches(full)]
    for scheme in (QuantScheme(3, 8), QuantScheme(3, 16), QuantScheme(16, 4)):
        vlm = twin(full)
        quantize(vlm, find_method("lsq_feature(weights='rtn')"), scheme, images)
        with torch.no_grad():
            assert torch.isfinite(vlm.encode_image(images[0]["image"])).all()


@pytest.mark.parametrize(
    ("kept", "message"),
    [(None, "no batch with an image"), (["tokens"], "has no 'image'"), (["image"], "has no 'tokens'")],
)
def test_calibration_data_without_what_the_scope_needs_are_refused(kept: list[str] | None, message: str):
    """Of weights alone, which round to nearest and look at no input."""
    vlm = shallow(build("vit_clean"))
    batches = [] if kept is None else [{name: batch[name] for name in kept} for batch in make_batches(vlm)]
    with pytest.raises(VLMQError, match=message):
        quantize(vlm, "lsq_contrastive(weights='rtn')", QuantScheme(3, 16, scope="vision_text"), batches)
