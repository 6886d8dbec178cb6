from contextlib import suppress

import numpy as np
import pytest
import torch
from cases.determinism import CudaDeterminism
from cases.quant import build, make_batches, second_moment, squared_output_error
from timm.layers import Conv2dSame
from torch import nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import METHODS, QuantConv2d, QuantLinear, QuantScheme, observers, quantize, swap_layers
from lightning_vlmq.quant.calibrating import RangeObserver
from lightning_vlmq.quant.observers import HistogramObserver, MagnitudeObserver, output_error, second_moments

LAYERS = [
    nn.Linear(6, 4),
    nn.Conv2d(6, 4, 3, stride=2, padding=1),
    nn.Conv2d(6, 6, 5, padding=2, groups=6),
    nn.Conv2d(6, 4, 3, groups=2, dilation=2, padding="same"),
    nn.Conv2d(6, 4, (3, 2), padding=(1, 0), padding_mode="circular"),
    Conv2dSame(6, 4, (5, 3), stride=(3, 2), groups=2),
]


@pytest.mark.parametrize("index", range(len(LAYERS)))
def test_second_moment_gives_the_squared_output_error(index: int):
    source = LAYERS[index]
    layer = (QuantLinear if isinstance(source, nn.Linear) else QuantConv2d)(source, QuantScheme()).eval()
    x = torch.randn(7, 5, 6) if isinstance(source, nn.Linear) else torch.randn(7, 6, 8, 8)
    other = layer.weight.detach() + 0.1 * torch.randn_like(layer.weight)
    outputs = source(x)
    per_vector = squared_output_error(layer, x, other, layer.weight) / (outputs.numel() / outputs.shape[1])
    if isinstance(source, nn.Linear):
        per_vector = squared_output_error(layer, x, other, layer.weight) / 35
    with torch.no_grad():
        assert output_error(layer, other, second_moment(layer, x)).item() == pytest.approx(per_vector, rel=1e-4)


def test_moments_do_not_depend_on_the_memory_budget(monkeypatch: pytest.MonkeyPatch):
    vlm = build("convnext_clean")
    swap_layers(vlm, QuantScheme())
    batches = make_batches(vlm, (2,))
    with torch.no_grad():
        whole = {name: moment for name, _, moment in second_moments(vlm, QuantScheme(), batches)}
        monkeypatch.setattr(observers, "MOMENT_BUDGET", max(moment.numel() for moment in whole.values()))
        parts = {name: moment for name, _, moment in second_moments(vlm, QuantScheme(), batches)}
    assert list(whole) == list(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_histogram_quantiles_against_numpy():
    x = torch.randn(3, 5000).exp()
    histogram = HistogramObserver(x.min().item(), x.max().item())
    for part in x:
        histogram.observe(part)
    assert histogram.counts.sum() == x.numel() == histogram.seen
    width = (x.max() - x.min()).item() / 4096
    for share in (0.0, 0.001, 0.5, 0.9, 0.99, 1.0):
        assert histogram.quantile(share) == pytest.approx(np.quantile(x.numpy(), share), abs=width)


def test_histogram_of_a_constant():
    histogram = HistogramObserver(2.0, 2.0)
    histogram.observe(torch.full((9,), 2.0))
    assert histogram.counts.sum() == 9
    assert histogram.quantile(0.5) == pytest.approx(2.0, rel=1e-5)


def test_channel_statistics():
    x = torch.randn(4, 3, 5, 6)
    observer = MagnitudeObserver(nn.Conv2d(3, 2, 1))
    for part in x.split(3):
        observer.observe(part)
    torch.testing.assert_close(observer.absolute_maximum, x.abs().amax((0, 2, 3)))
    torch.testing.assert_close(observer.mean_magnitude, x.abs().mean((0, 2, 3)))
    factor = torch.rand(3) + 0.1
    scaled = x / factor[:, None, None]
    assert observer.scaled_range(factor) == (scaled.min(), scaled.max())
    linear = MagnitudeObserver(nn.Linear(6, 2))
    linear.observe(x)
    torch.testing.assert_close(linear.mean_magnitude, x.abs().mean((0, 1, 2)))


def test_range_is_the_range_of_all_batches():
    x = torch.randn(5, 40)
    observer = RangeObserver()
    for part in x:
        observer.observe(part)
    assert observer.minimum == x.min() and observer.maximum == x.max() and observer.seen == 200


def test_histogram_counts_are_those_of_torch():
    x = torch.randn(20_000)
    histogram = HistogramObserver(-1.5, 2.0)
    histogram.observe(torch.cat([x, torch.tensor([torch.nan, -1.5, 2.0])]))
    expected = torch.histc(torch.cat([x, torch.tensor([-1.5, 2.0])]), 4096, -1.5, 2.0)
    assert histogram.counts.sum() == expected.sum()
    assert (histogram.counts - expected).abs().sum() <= 4  # values on an edge, where both round


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].needs_training])
def test_quantizing_needs_nothing_that_cuda_cannot_do_deterministically(method: str):
    vlm = build("convnext_clean")
    scheme = QuantScheme(8, 8, scope="vision_text")
    with CudaDeterminism(), suppress(VLMQError):  # noise is seldom matched on so few images, but was drawn by then
        quantize(vlm, method, scheme, make_batches(vlm, (16,)))
        with torch.no_grad():
            vlm.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs_training])
def test_a_training_step_needs_nothing_that_cuda_cannot_do_deterministically(name: str):
    vlm = build("align_clean")
    batch = make_batches(vlm, (4,))
    with CudaDeterminism():
        quantize(vlm, name, QuantScheme(4, 8, scope="vision_text"), batch)
        image, text = vlm.encode_image(batch[0]["image"]), vlm.encode_text(batch[0]["tokens"])
        teacher = torch.nn.functional.normalize(torch.randn_like(image), dim=-1)
        METHODS[name].loss(image, text, teacher, teacher, vlm.logit_scale()).backward()
