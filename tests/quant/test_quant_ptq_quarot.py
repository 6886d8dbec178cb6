import pytest
import torch
from quant_cases import build, make_batches
from torch import nn

from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.transforms import Rotation, randomized_hadamard


@pytest.mark.parametrize("channels", [1, 2, 3, 12, 64, 96, 269 * 4])
def test_rotation_is_orthogonal_and_matches_its_matrix(channels: int):
    signs, left, right = randomized_hadamard(channels, torch.Generator().manual_seed(3))
    matrix = torch.kron(left, right) * signs
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-10)
    x = torch.randn(5, 2, channels, dtype=torch.float64)
    torch.testing.assert_close(Rotation(signs, left, right)(x), x @ matrix.T)
    image = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    expected = torch.einsum("ij,bjhw->bihw", matrix, image)
    torch.testing.assert_close(Rotation(signs.view(-1, 1, 1), left, right)(image), expected)


def test_one_outlier_channel_is_spread_over_all():
    signs, left, right = randomized_hadamard(96, torch.Generator().manual_seed(0))
    x = torch.zeros(96, dtype=torch.float64)
    x[40] = 1.0
    spread = Rotation(signs, left, right)(x).abs()
    assert spread.max() <= (2 / 96) ** 0.5 + 1e-9  # 1 / sqrt(n) for powers of two, at most sqrt(2 / n) otherwise


def test_same_seed_same_rotations_and_depthwise_is_left_alone():
    models = [build("convnext_clean") for _ in range(2)]
    for model in models:
        quantize(model, "quarot", QuantScheme(), make_batches(model))
    for one, other in zip(*(quantized_layers(model).values() for model in models)):
        is_depthwise = isinstance(one, nn.Conv2d) and one.groups > 1
        assert isinstance(one.input_transform, nn.Identity if is_depthwise else Rotation)
        assert torch.equal(one.weight, other.weight)
