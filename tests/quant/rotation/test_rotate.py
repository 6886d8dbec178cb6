import copy

import pytest
import torch
from cases.quant import build, make_batches
from cases.rotation import STREAMS, clip, outputs, randomize, relative_errors
from torch import nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import TOWERS
from lightning_vlmq.quant import LayerRule, QuantScheme, load_quantized, quantize, quantized_layers, save_quantized
from lightning_vlmq.quant.calibrating import full_precision
from lightning_vlmq.quant.rotation.rotate import rotate, rotated_towers
from lightning_vlmq.quant.transforms import HeadRotation, Rotation
from lightning_vlmq.spectral import matrix_weights


@pytest.mark.parametrize("name", STREAMS)
def test_folding_changes_no_output(name: str):
    make, streams = STREAMS[name]
    for seed in range(3):
        vlm = randomize(make(), seed)
        batch = make_batches(vlm)[0]
        before, weights = outputs(vlm, batch), copy.deepcopy(vlm.state_dict())
        rotate(vlm, TOWERS)
        assert rotated_towers(vlm) == list(streams)
        assert max(relative_errors(outputs(vlm, batch), before)) < 1e-4
        after = vlm.state_dict()
        for tower in TOWERS:
            own = [k for k in weights if vlm.tower_of(k) == tower]
            changed = [k for k in own if k not in after or not torch.equal(weights[k], after[k])]
            assert len(changed) > 10 if tower in streams else not changed


@pytest.mark.parametrize("name", ["clip", "siglip", "coca", "align", "convnext", "layer scale", "custom blocks"])
def test_rotations_at_run_time_change_no_output_either(name: str):
    vlm = randomize(STREAMS[name][0](), 1)
    batches = make_batches(vlm)
    before = outputs(vlm, batches[0])
    quantize(vlm, "quarot", QuantScheme(4, 4, scope="vision_text"), batches, minimum_coverage=0.5)
    assert max(relative_errors(outputs(vlm, batches[0]), before)) > 1e-2
    with full_precision(vlm):
        assert max(relative_errors(outputs(vlm, batches[0]), before)) < 1e-4


def test_norms_in_the_stream_are_left_without_mean_gain_and_bias():
    vlm = randomize(build("vit_clean"), 0)
    rotate(vlm, ("vision",))
    visual, seen = vlm.model.visual, []
    visual.transformer.register_forward_hook(lambda m, args, out: seen.extend([*args, out]))
    for block in visual.transformer.resblocks:
        assert isinstance(block.ln_1, nn.RMSNorm) and not list(block.ln_1.parameters())
    outputs(vlm, make_batches(vlm)[0])
    rotation = visual.ln_pre.rotation
    for stream in seen:
        assert rotation.inverse(stream).mean(-1).abs().max() < 1e-5 * stream.abs().max()


def test_scope_vision_leaves_the_text_tower_untouched():
    vlm = randomize(build("coca_clean"), 0)
    before = copy.deepcopy(vlm.state_dict())
    quantize(vlm, "quarot", QuantScheme(8, 8), make_batches(vlm))
    after = vlm.state_dict()
    text = [key for key in before if vlm.tower_of(key) == "text"]
    assert text and all(torch.equal(before[key], after[key]) for key in text)
    assert {key for key in after if vlm.tower_of(key) == "text"} == set(text)


def test_a_tower_is_rotated_the_same_whatever_the_other_one_does():
    one, both = build("vit_clean"), build("vit_clean")
    quantize(one, "quarot", QuantScheme(), make_batches(one))
    quantize(both, "quarot", QuantScheme(scope="vision_text"), make_batches(both))
    other = both.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in one.state_dict().items() if k.startswith("model.visual."))


def test_values_are_rotated_by_hadamard_matrices_within_and_across_heads():
    vlm = build("vit_clean")
    attention = vlm.model.visual.transformer.resblocks[0].attn
    online = rotate(vlm, ("vision",))
    across = online["model.visual.transformer.resblocks.0.attn.out_proj"]
    assert isinstance(across, HeadRotation)
    within = attention.v_proj.folds["output"].rotation
    matrix = across.matrix.kron(torch.eye(24).double()) @ within(torch.eye(96)).T.double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(96).double(), rtol=0, atol=1e-6)
    assert matrix.abs().max() <= (2 / 3 / 8 / 4) ** 0.5 + 1e-6  # 24 channels: cosines of 3 times Hadamard of 8; 4 heads
    assert (matrix.abs() > 1e-6).sum() >= 96**2 * 8 / 9  # a cosine transform of 3 has one zero


def test_one_outlier_channel_of_the_stream_is_spread_over_all():
    vlm = clip({"no_ln_pre": True})
    with torch.no_grad():
        vlm.model.visual.class_embedding.zero_()[5] = 100
        vlm.model.visual.positional_embedding[0] = 0
    rotate(vlm, ("vision",))
    token = vlm.model.visual.class_embedding
    assert token.abs().max() <= 100 * ((2 / 48) ** 0.5 + 48**-0.5)  # the second term: centring
    torch.testing.assert_close(token.norm(), torch.tensor(100 * (1 - 1 / 48) ** 0.5))


def test_tied_weights_come_apart_and_shared_layers_stay_unfolded():
    vlm = randomize(clip(), 0)
    visual, text = vlm.model.visual.transformer.resblocks, vlm.model.transformer.resblocks
    visual[1].mlp.c_fc.weight = visual[0].mlp.c_fc.weight
    text[1].mlp.c_fc = text[0].mlp.c_fc
    batch = make_batches(vlm)[0]
    before = outputs(vlm, batch)
    rotate(vlm, TOWERS)
    assert rotated_towers(vlm) == ["vision"]
    assert max(relative_errors(outputs(vlm, batch), before)) < 1e-4


def test_a_part_that_is_not_known_stops_the_fold():
    vlm = build("vit_clean")
    vlm.model.visual.transformer.resblocks[2].register_parameter("gate", nn.Parameter(torch.ones(96)))
    report = quantize(vlm, "quarot", QuantScheme(), make_batches(vlm)).coverage
    assert report.rotations == {"vision": "inside the blocks (its ResidualAttentionBlock has an unknown part 'gate')"}
    assert isinstance(vlm.model.visual.transformer.resblocks[0].attn.q_proj.input_transform, Rotation)


def test_the_report_says_where_the_rotations_are():
    kinds = {}
    for name in ("vit_clean", "convnext_clean"):
        vlm = build(name)
        report = quantize(vlm, "quarot", QuantScheme(scope="vision_text"), make_batches(vlm)).coverage
        assert type(report).from_dict(report.to_dict()) == report
        assert all(f"Rotated, {tower}: {kind}" in report.table().caption for tower, kind in report.rotations.items())
        kinds[name] = report.rotations
    assert kinds["vit_clean"] == {"vision": "residual stream", "text": "residual stream"}
    assert kinds["convnext_clean"]["text"] == "residual stream"
    assert kinds["convnext_clean"]["vision"].startswith("inside the blocks (a ConvNeXt ")
    plain = build("vit_clean")
    assert quantize(plain, "minmax", QuantScheme(), make_batches(plain)).coverage.rotations == {}


def test_rotations_at_run_time_are_counted():
    vlm = build("vit_clean")
    plain = quantize(copy.deepcopy(vlm), "minmax", QuantScheme(), make_batches(vlm)).coverage
    report = quantize(vlm, "quarot", QuantScheme(), make_batches(vlm)).coverage
    row = next(row for row in report.rows if row.layer_type == "rotation")
    tokens, width, heads, depth = 17, 96, 4, 4
    entry = tokens * width * (12 + 8)  # 96 = 3 * 2^5 splits into factors of 12 and 8
    inner = tokens * 4 * width * (24 + 16)  # 384 = 3 * 2^7 into 24 and 16
    assert row.macs == entry + depth * (tokens * width * heads + inner)
    assert row.macs_quantized == row.weights == 0 and row.tower == "vision"
    others = [(r.tower, r.layer_type, r.macs) for r in report.rows if r is not row]
    assert others == [(r.tower, r.layer_type, r.macs) for r in plain.rows]


@pytest.mark.parametrize("name", ["clip", "siglip", "coca", "layer scale", "no first norm", "timm average"])
def test_matrix_weights_are_those_of_full_precision(name: str):
    vlm = randomize(STREAMS[name][0](), 2)
    before = {layer: weight.clone() for layer, weight in matrix_weights(vlm).items()}
    eight = copy.deepcopy(vlm)
    scheme = QuantScheme(16, 8, scope="vision_text")
    quantize(vlm, "quarot", scheme, make_batches(vlm), minimum_coverage=0.5)
    after = matrix_weights(vlm)
    assert after.keys() == before.keys()
    for layer, weight in before.items():
        torch.testing.assert_close(after[layer], weight, rtol=1e-4, atol=2e-6 * weight.abs().max().item() + 2e-6)
    quantize(eight, "quarot", QuantScheme(8, 16, scope="vision_text"), make_batches(eight), minimum_coverage=0.5)
    errors = [((w - before[n]).norm() / before[n].norm()).item() for n, w in matrix_weights(eight).items()]
    assert 0 < max(errors) < 0.05


def test_channels_that_a_zero_gain_shuts_out_come_back_as_zeros():
    vlm = clip({"ls_init_value": 0.5})
    block = vlm.model.visual.transformer.resblocks[0]
    with torch.no_grad():
        block.ln_1.weight[3] = block.ls_2.gamma[7] = 0
    batch = make_batches(vlm)[0]
    before, weights = outputs(vlm, batch), {n: w.clone() for n, w in matrix_weights(vlm).items()}
    rotate(vlm, TOWERS)
    assert max(relative_errors(outputs(vlm, batch), before)) < 1e-4
    q, fc2 = (f"model.visual.transformer.resblocks.0.{n}" for n in ("attn.q_proj", "mlp.c_proj"))
    weights[q][:, 3] = weights[fc2][7] = 0
    after = matrix_weights(vlm)
    for name in (q, fc2):
        torch.testing.assert_close(after[name], weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["siglip", "coca", "align", "two poolers", "timm average"])
def test_outputs_are_bit_identical_after_loading(tmp_path, name: str):
    make = STREAMS[name][0]
    vlm = randomize(make(), 0)
    rules = [LayerRule("*resblocks.0.mlp*", skip=True)]
    scheme = QuantScheme(4, 8, scope="vision_text", overrides=rules)
    batches = make_batches(vlm)
    made = quantize(vlm, "quarot", scheme, batches, minimum_coverage=0.5)
    save_quantized(vlm, tmp_path, made)
    before = outputs(vlm, batches[0])
    fresh = randomize(make(), 5)
    loaded = load_quantized(fresh, tmp_path)
    assert loaded.coverage == made.coverage
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, batches[0]), before))
    assert rotated_towers(fresh) == rotated_towers(vlm)
    weights = matrix_weights(fresh)
    assert all(torch.equal(weights[layer], weight) for layer, weight in matrix_weights(vlm).items())


def test_a_checkpoint_with_a_rotated_stream_is_refused_by_a_model_without_one(tmp_path):
    vlm = build("vit_clean")
    save_quantized(vlm, tmp_path, quantize(vlm, "quarot", QuantScheme(), make_batches(vlm)))
    with pytest.raises(VLMQError, match=r"vision tower of 'convnext_clean' is not the checkpoint's.* a ConvNeXt "):
        load_quantized(build("convnext_clean"), tmp_path)


def test_layers_left_in_full_precision_are_folded_and_not_rotated_at_run_time():
    vlm = randomize(build("vit_clean"), 0)
    batches = make_batches(vlm)
    before = outputs(vlm, batches[0])
    rule = LayerRule("*resblocks.[01].*", skip=True)
    quantize(vlm, "quarot", QuantScheme(overrides=[rule]), batches, minimum_coverage=0.1)
    assert not any("resblocks.0" in name for name in quantized_layers(vlm))
    with full_precision(vlm):
        assert max(relative_errors(outputs(vlm, batches[0]), before)) < 1e-4


def test_a_model_is_rotated_once():
    vlm = build("vit_clean")
    rotate(vlm, ("text",))
    with pytest.raises(VLMQError, match="fresh full-precision copy"):
        rotate(vlm, ("vision",))
