import copy

import pytest
import torch
from cases.quant import SEEDS, build, float_output, make_batches, outlier_layer
from torch import Tensor, nn

from lightning_vlmq.models import VLM
from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.rotation.rotate import rotate_input
from lightning_vlmq.quant.transforms import HeadRotation, Rotation, randomized_hadamard


@pytest.mark.parametrize("channels", [1, 2, 3, 12, 64, 96, 269 * 4])
def test_rotation_is_orthogonal_and_matches_its_matrix(channels: int):
    signs, left, right = randomized_hadamard(channels, torch.Generator().manual_seed(3))
    matrix = torch.kron(left, right) * signs
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-10)
    x = torch.randn(5, 2, channels, dtype=torch.float64)
    rotation = Rotation(signs, left, right)
    torch.testing.assert_close(rotation(x), x @ matrix.T)
    torch.testing.assert_close(rotation.inverse(x), x @ matrix)
    image = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    expected = torch.einsum("ij,bjhw->bihw", matrix, image)
    torch.testing.assert_close(Rotation(signs.view(-1, 1, 1), left, right)(image), expected)


@pytest.mark.parametrize(("heads", "size"), [(1, 5), (3, 4), (8, 1)])
def test_head_rotation_matches_its_matrix(heads: int, size: int):
    _, left, right = randomized_hadamard(heads, torch.Generator().manual_seed(3))
    x = torch.randn(2, 7, heads * size, dtype=torch.float64)
    across = torch.kron(left, right)
    expected = x @ torch.kron(across, torch.eye(size, dtype=torch.float64)).T
    torch.testing.assert_close(HeadRotation(across)(x), expected)


def test_one_outlier_channel_is_spread_over_all():
    signs, left, right = randomized_hadamard(96, torch.Generator().manual_seed(0))
    x = torch.zeros(96, dtype=torch.float64)
    x[40] = 1.0
    spread = Rotation(signs, left, right)(x).abs()
    assert spread.max() <= (2 / 96) ** 0.5 + 1e-9  # 1 / sqrt(n) for powers of two, at most sqrt(2 / n) otherwise


def test_where_rotations_remain_at_run_time():
    vlm = build("coca_clean")
    quantize(vlm, "quarot", QuantScheme(), make_batches(vlm))
    kinds = {name.removeprefix("model.visual."): type(q.input_transform) for name, q in quantized_layers(vlm).items()}
    expected = {
        "conv1": nn.Identity,  # reads the image
        "attn_pool.attn.q_proj": Rotation,  # reads queries of its own
        "attn_pool.attn.k_proj": nn.Identity,
        "attn_pool.attn.v_proj": nn.Identity,
        "attn_pool.attn.out_proj": HeadRotation,
        "proj": Rotation,  # behind the pooling
    }
    for block in range(3):
        layers = dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.c_fc"), nn.Identity)
        layers |= {"attn.out_proj": HeadRotation, "mlp.c_proj": Rotation}
        expected |= {f"transformer.resblocks.{block}.{name}": kind for name, kind in layers.items()}
    assert kinds == expected


def test_same_seed_same_rotations_and_depthwise_is_left_alone():
    models = [build("convnext_clean") for _ in range(2)]
    for model in models:
        quantize(model, "quarot", QuantScheme(), make_batches(model))
    for one, other in zip(*(quantized_layers(model).values() for model in models)):
        is_depthwise = isinstance(one, nn.Conv2d) and one.groups > 1
        assert isinstance(one.input_transform, nn.Identity if is_depthwise else Rotation)
        assert torch.equal(one.weight, other.weight)


def input_errors(vlm: VLM, batch: dict[str, Tensor]) -> dict[str, float]:
    """Relative squared error that quantization makes on the input of each layer that reads the residual stream."""
    errors: dict[str, float] = {}

    def watch(name: str):
        def hook(layer, args):
            x = layer.input_transform(args[0])
            errors[name] = ((layer.quantized_input(args[0]) - x).square().sum() / x.square().sum()).item()

        return hook

    readers = ("q_proj", "k_proj", "v_proj", "c_fc")
    layers = {name: q for name, q in quantized_layers(vlm).items() if name.endswith(readers)}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        vlm.encode_image(batch["image"])
    for hook in hooks:
        hook.remove()
    return errors


@pytest.mark.parametrize("seed", SEEDS)
def test_outlier_channels_of_the_residual_stream_cost_less(seed: int):
    vlm = build("vit_clean", seed)
    outliers = torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:2]
    with torch.no_grad():
        vlm.model.visual.ln_pre.weight[outliers] *= 40
        batches = make_batches(vlm, seed=seed)
        reference = vlm.encode_image(batches[0]["image"])
        errors, distances = {}, {}
        for method in ("minmax", "quarot"):
            quantized = copy.deepcopy(vlm)
            quantize(quantized, method, QuantScheme(16, 6), batches)
            errors[method] = input_errors(quantized, batches[0])
            distances[method] = (quantized.encode_image(batches[0]["image"]) - reference).square().sum().item()
    assert len(errors["quarot"]) == 16
    for layer, error in errors["quarot"].items():
        assert error < 0.5 * errors["minmax"][layer], layer
    assert distances["quarot"] < distances["minmax"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_outlier_channels_of_a_layers_input_cost_less(kind: str, symmetric: bool, seed: int):
    """At the layer's output, with float weights: the error that activation quantization alone makes."""
    layer, x = outlier_layer(kind, QuantScheme(16, 8, act_symmetric=symmetric), seed)
    rotation = Rotation(*randomized_hadamard(x.shape[1], torch.Generator().manual_seed(seed)))
    errors = []
    with torch.no_grad():
        reference = float_output(layer, x, layer.weight)
        for rotate in (False, True):
            if rotate:
                rotate_input(layer, rotation)
            moved = layer.input_transform(x)
            layer.act_fake_quant.set_range(moved.min().view(1), moved.max().view(1))
            errors.append((layer(x) - reference).square().sum().item())
    assert errors[1] < 0.5 * errors[0]
