"""Figures of spectra draw the values that they are given."""

import numpy as np
import torch

from lightning_vlmq.plotting.spectra import UNROLLED, log_ratio_heatmap, singular_value_curves
from lightning_vlmq.spectral import LayerSpectrum, Spectrum


def layer_spectrum(name, group, values, reference):
    return LayerSpectrum(name, group, Spectrum(torch.tensor(values)), reference and Spectrum(torch.tensor(reference)))


def test_heatmap_shows_octaves_over_relative_rank():
    layers = [
        layer_spectrum("model.visual.proj", "vision/projection", [4.0, 2.0, 1.0], [1.0, 1.0, 1.0]),
        layer_spectrum("model.transformer.resblocks.0.mlp.c_fc", "text/mlp", [1.0], [2.0]),
    ]
    figure = log_ratio_heatmap(layers, "title", "quantized", "FP32")
    axes, _ = figure.axes
    text, vision = axes.images[0].get_array().data  # sorted by group
    np.testing.assert_allclose(text, -1)
    np.testing.assert_allclose(vision, np.linspace(2, 0, len(vision)), atol=1e-6)  # 2, 1, 0 octaves, linear between
    low, high = axes.images[0].get_clim()
    assert low == -high  # white is no change
    assert "title: log2(σ quantized / σ FP32)" in [text.get_text() for text in figure.texts]
    figure.canvas.draw()
    for text in figure.texts:  # nothing is cut
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert {"0.mlp.c_fc", "proj", "text/mlp", "vision/projection"} <= {text.get_text() for text in axes.texts}


def test_curves_draw_every_value_of_every_layer():
    values, reference = [3.0, 2.0, 1.0], [2.5, 2.0, 1.5]
    layers = [
        layer_spectrum("model.visual.transformer.resblocks.0.attn.q_proj", "vision/attention", values, reference),
        layer_spectrum("model.visual.transformer.resblocks.1.attn.q_proj", "vision/attention", reference, None),
        layer_spectrum("model.visual.transformer.resblocks.0.attn.k_proj", "vision/attention", [1.0], [1.0]),
    ]
    (axes,) = singular_value_curves(layers, "title", "quantized", "FP32").axes
    solid, dashed, *_ = axes.collections
    drawn = [segment[:, 1].tolist() for segment in solid.get_segments()]
    assert drawn == [values, reference, [1.0, 1.0]]
    assert [segment[:, 1].tolist() for segment in dashed.get_segments()] == [reference, [1.0, 1.0]]
    assert {"attn.q_proj", "attn.k_proj"} == {text.get_text() for text in axes.texts}
    low, high = axes.get_ylim()
    assert low < 1 and high > 3


def test_many_roles_wrap_into_rows():
    layers = [layer_spectrum(f"role{chr(97 + i)}", "vision/conv", [1.0, 0.5], None) for i in range(6)]
    assert [len(axes.texts) for axes in singular_value_curves(layers, "title", "model", "FP32").axes] == [4, 2]


def test_what_convolutions_spectra_are_is_said():
    """In both figures, where there are any; and nothing is cut."""
    convolution = layer_spectrum("model.visual.stem", "vision/conv", [4.0, 2.0], [1.0, 1.0])
    other = layer_spectrum("model.visual.proj", "vision/projection", [4.0, 2.0], [1.0, 1.0])
    for draw, words in ((log_ratio_heatmap, UNROLLED), (singular_value_curves, "unrolled kernel matrix")):
        for layers in ([convolution], [other]):
            figure = draw(layers, "title", "quantized", "FP32")
            assert any(words in text.get_text() for text in figure.texts) == (convolution in layers)
            figure.canvas.draw()
            boxes = [text.get_window_extent() for text in figure.texts]
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
