import pytest
import scipy.stats
import torch
from cases.quant import build
from torch import nn
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.quant.transforms import ChannelScale
from lightning_vlmq.spectral import LayerSpectrum, Spectrum, layer_group, matrix_weights, weight_spectra


class Halved(nn.Linear):
    def effective_weight(self) -> torch.Tensor:
        return self.weight / 2


def test_effective_weights_come_before_stored_ones():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Sequential(Halved(4, 5), nn.Linear(5, 2)), nn.LayerNorm(2))
    weights = matrix_weights(model)
    assert list(weights) == ["0", "2.0", "2.1"]
    assert torch.equal(weights["2.0"], model[2][0].weight / 2)
    assert torch.equal(weights["2.1"], model[2][1].weight)
    assert not any(weight.requires_grad for weight in weights.values())


class Rotation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.matrix = torch.from_numpy(scipy.stats.ortho_group.rvs(width, random_state=0))

    def forward(self, x):
        return x @ self.matrix


class Transformed(nn.Linear):
    def effective_weight(self):
        return self.weight


class TransformedConv(nn.Conv2d):
    def effective_weight(self):
        return self.weight


@pytest.mark.parametrize("transform", [ChannelScale(torch.rand(6, dtype=torch.float64) + 0.5), Rotation(6)])
def test_what_a_method_moved_into_the_weight_is_folded_back(transform):
    layer = Transformed(6, 4, bias=False, dtype=torch.float64)
    layer.input_transform = transform
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, matrix_weights(layer)[""]), F.linear(transform(x), layer.weight))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_folding_into_convolutions_of_any_grouping(groups):
    layer = TransformedConv(6, 12, 3, groups=groups, bias=False, dtype=torch.float64)
    layer.input_transform = ChannelScale(torch.rand(6, 1, 1, dtype=torch.float64) + 0.5)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    expected = F.conv2d(layer.input_transform(x), layer.weight, groups=groups)
    torch.testing.assert_close(F.conv2d(x, matrix_weights(layer)[""], groups=groups), expected)


@pytest.mark.parametrize("method", ["smoothquant", "quarot"])
def test_methods_that_only_move_scales_and_rotations_leave_the_matrices(method):
    vlm = build("convnext_clean")
    before = {name: weight.clone() for name, weight in matrix_weights(vlm).items()}
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    calibration = [{"image": images, "tokens": vlm.tokenize(["a red shoe", "a blue bag", "a shirt", "a coat"])}]
    quantize(vlm, method, QuantScheme(weight_bits=16, act_bits=8, scope="vision_text"), calibration)
    after = matrix_weights(vlm.eval())
    assert after.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)


def test_a_transform_across_groups_is_refused():
    class Flip(nn.Module):
        def forward(self, x):
            return x.flip(1)

    layer = TransformedConv(6, 6, 3, groups=2)
    layer.input_transform = Flip()
    with pytest.raises(VLMQError, match="mixes the convolution's groups"):
        matrix_weights(layer)


@pytest.mark.parametrize(
    ("name", "ndim", "tower", "group"),
    [
        ("model.visual.transformer.resblocks.0.attn.q_proj", 2, "vision", "vision/attention"),
        ("model.transformer.resblocks.1.attn.out_proj", 2, "text", "text/attention"),
        ("model.visual.transformer.resblocks.0.mlp.c_proj", 2, "vision", "vision/mlp"),
        ("model.visual.trunk.stages.0.blocks.1.conv_dw", 4, "vision", "vision/conv"),
        ("model.visual.trunk.stages.0.blocks.1.mlp.fc1", 4, "vision", "vision/mlp"),
        ("model.visual.trunk.attn_pool.mlp.fc2", 2, "vision", "vision/mlp"),
        ("model.visual.trunk.attn_pool.kv", 2, "vision", "vision/attention"),
        ("model.visual.conv1", 4, "vision", "vision/conv"),
        ("model.visual.proj", 2, "vision", "vision/projection"),
        ("model.visual.head.proj", 2, "vision", "vision/projection"),
        ("model.text_projection", 2, "text", "text/projection"),
        ("text_model.encoder.layer.0.attention.self.query", 2, "text", "text/attention"),
        ("text_model.encoder.layer.0.attention.output.dense", 2, "text", "text/attention"),
        ("text_model.encoder.layer.0.intermediate.dense", 2, "text", "text/mlp"),
        ("text_model.encoder.layer.0.output.dense", 2, "text", "text/mlp"),
        ("adapter", 2, None, "joint/projection"),
    ],
)
def test_groups_of_layers_as_the_libraries_name_them(name, ndim, tower, group):
    assert layer_group(name, torch.zeros([2] * ndim), tower) == group


def test_a_layer_that_is_not_finite_is_named():
    with pytest.raises(VLMQError, match=r"layer 'second': .*NaN"):
        weight_spectra({"first": torch.ones(2, 2), "second": torch.full((2, 2), torch.nan)})


def test_log_ratio_needs_a_reference():
    spectrum = Spectrum(torch.tensor([2.0, 1.0]))
    reference = Spectrum(torch.tensor([1.0, 1.0]))
    assert LayerSpectrum("a", "g", spectrum, reference).log_ratio().tolist() == [1.0, 0.0]
    with pytest.raises(VLMQError, match="layer 'a' has no reference"):
        LayerSpectrum("a", "g", spectrum, None).log_ratio()
