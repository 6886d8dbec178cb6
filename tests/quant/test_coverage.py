import open_clip
import pytest
import rich
import torch
from cases.quant import build, make_batches
from torch import nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.quant import (
    CoverageReport,
    QuantScheme,
    assert_covered,
    measure_coverage,
    quantize,
    quantized_layers,
    swap_layers,
)


def give_any_grid(vlm: VLM) -> None:
    """Coverage asks what runs through quantized layers, not how well, so calibration is spared."""
    for layer in quantized_layers(vlm).values():
        for quantizer in (layer.weight_fake_quant, layer.act_fake_quant):
            quantizer.set_qparams(torch.ones_like(quantizer.scale))


def test_full_precision_counts_as_nothing_quantized(vlm: VLM):
    report = measure_coverage(vlm)
    assert report.weight_share() == report.mac_share() == 0
    with pytest.raises(VLMQError, match=r"only 0.0% of the vision matrix weights .* left out: model\.visual\."):
        assert_covered(report, "vision")


def test_scope_shows_in_the_report(vlm: VLM):
    report = quantize(vlm, "minmax", QuantScheme(scope="vision"), make_batches(vlm)).coverage
    assert report.weight_share(("vision",)) == 1 and report.weight_share(("text",)) == 0
    assert 0.9 < report.mac_share(("vision",)) <= 1
    assert set(report.unquantized) and all(vlm.tower_of(name) == "text" for name in report.unquantized)
    assert_covered(report, "vision")
    with pytest.raises(VLMQError, match="vision_text matrix weights"):
        assert_covered(report, "vision_text")


def test_tables_are_excluded_by_name_and_every_parameter_is_accounted_for(vlm: VLM):
    report = measure_coverage(vlm)
    assert "model.token_embedding.weight" in report.excluded and "model.positional_embedding" in report.excluded
    counted = sum(row.weights for row in report.rows) + sum(report.excluded.values())
    assert counted == sum(p.numel() for n, p in vlm.named_parameters() if p.ndim > 1 and vlm.tower_of(n))
    assert not any("proj" in name or "conv" in name or "mlp" in name for name in report.excluded)


def test_macs_of_a_vit_against_a_count_by_hand(vit: VLM):
    report = measure_coverage(vit)
    width, tokens, dim = 96, 17, vit.model.visual.proj.out_features
    depth = len(vit.model.visual.transformer.resblocks)
    by_type = {row.layer_type: row.macs for row in report.rows if row.tower == "vision"}
    assert by_type["conv2d"] == 16 * 3 * 8 * 8 * width
    assert by_type["linear"] == depth * tokens * width * width * (4 + 8) + width * dim
    assert by_type["activation_product"] == depth * 2 * tokens * tokens * width


def test_depthwise_convolutions_are_a_type_of_their_own():
    vlm = build("convnext_clean")
    report = quantize(vlm, "minmax", QuantScheme(), make_batches(vlm)).coverage
    row = next(row for row in report.rows if row.layer_type == "depthwise_conv2d")
    expected = [m for m in vlm.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert expected and row.weights == row.weights_quantized == sum(m.weight.numel() for m in expected)
    assert row.macs == row.macs_quantized > 0


def test_a_quantized_layer_whose_forward_is_bypassed_is_not_covered():
    """What happens to packed attention: its out_proj is a layer, but its weight is read directly."""
    vlm = build("vit_clean")
    for block in vlm.model.visual.transformer.resblocks:
        block.attn = nn.MultiheadAttention(96, 4, batch_first=True)
    swap_layers(vlm, QuantScheme())
    give_any_grid(vlm)
    report = measure_coverage(vlm)
    names = [name for name in report.unquantized if vlm.tower_of(name) == "vision"]
    assert any("in_proj_weight" in name for name in names) and any("out_proj" in name for name in names)
    with pytest.raises(VLMQError, match="in_proj_weight"):
        assert_covered(report, "vision")


def test_attention_of_vit_b_32_is_covered():
    torch.manual_seed(0)
    vlm = load_vlm("ViT-B-32", "none")
    reference = open_clip.create_model("ViT-B-32")
    swap_layers(vlm, QuantScheme(scope="vision_text"))
    give_any_grid(vlm)
    report = measure_coverage(vlm)
    matrices = {n: p.numel() for n, p in reference.named_parameters() if p.ndim > 1}
    tables = {n: s for n, s in matrices.items() if "embedding" in n}
    assert sum(row.weights for row in report.rows) == sum(matrices.values()) - sum(tables.values())
    assert sum(report.excluded.values()) == sum(tables.values())
    assert report.weight_share() == 1 and report.unquantized == {} and report.mac_share() > 0.97
    attention = sum(s for n, s in matrices.items() if "attn" in n)
    assert attention == 24 * 0 + 12 * 4 * 768**2 + 12 * 4 * 512**2


def test_report_survives_json_and_prints(vlm: VLM, capsys: pytest.CaptureFixture[str]):
    report = measure_coverage(vlm)
    assert CoverageReport.from_dict(report.to_dict()) == report
    rich.print(report.table())
    assert "Quantization coverage" in capsys.readouterr().out
    assert sum(row["weights"] for row in report.to_rows()) == sum(report.unquantized.values())
