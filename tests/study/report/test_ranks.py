"""Activations rank by rank in the report: from a store's curves to panels."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from cases.study import grid, make_run

from lightning_vlmq.plotting.activations import rank_windows
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.spectral import SecondMoments, rank_table
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.ranks import rank_curves, rank_maps, read_ranks
from lightning_vlmq.study.report.figures.spectra import LayerCurve
from lightning_vlmq.study.report.spectral import _weight_spectra, spectra_section

SITES = ("vision/block 0", "vision/block 1", "vision/output", "text/output")


def table(seed, damping=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(80, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 12, dtype=torch.float64)
    moments = SecondMoments(12)
    moments.update(z, damping * z + 0.02 * torch.randn(80, 12, generator=generator, dtype=torch.float64))
    return rank_table(moments)


def curves(seed, damping):
    parts = []
    for k, site in enumerate(SITES):
        own = table(seed + k, damping)
        rank = np.arange(1, len(own) + 1)
        for kind, y, reference in (
            ("sqnr_db", own.sqnr_db, np.nan),
            ("gain", own.gain, np.nan),
            ("eigenvalues", own.energy * 2, own.energy),
        ):
            columns = {
                "kind": kind,
                "layer": site,
                "group": site.split("/")[0],
                "x": rank,
                "y": y,
                "y_reference": reference,
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """Full precision, a quantization that dampens at eight and at four bits, and two seeds of a control at four."""
    store = ResultsStore(tmp_path_factory.mktemp("study"))
    keys = grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision_text"])
    noise = ("vit_clean", "clean", "vision_text", "matched_noise", 4, 8, 0)
    keys += [RunKey(*noise, variant=variant) for variant in ("", "seed=1")]
    for k, key in enumerate(keys):
        run_id = f"run-{k}"
        rows, samples, points = make_run(key, run_id, size=0.03)
        more = pd.DataFrame() if key.is_full_precision else curves(100 * k, 0.8 if key.method == "minmax" else 1.0)
        store.write(run_id, rows, samples, pd.concat([points, more], ignore_index=True))
    return analyse(StudyResults.load(store.root))


def test_curves_are_those_of_the_fewest_bits_and_the_first_seed(analysis):
    found = read_ranks(analysis, "vit_clean")
    assert [(s.method, s.weight_bits, s.variant) for s in found] == [("minmax", 4, ""), ("matched_noise", 4, "")]
    assert Setting("minmax", 4, 8, "vision_text") in found
    for sites in found.values():
        assert list(sites) == list(SITES)
    expected = table(200 + 2, 0.8)
    own = found[Setting("minmax", 4, 8, "vision_text")]["vision/output"]
    np.testing.assert_allclose(own.gain, expected.gain)
    edges = rank_windows(len(expected))
    pooled = np.array([expected.pooled(a, b)[:2] for a, b in pairwise(edges)])
    _, sqnr, gain = own.pooled()
    np.testing.assert_allclose(np.column_stack([sqnr, gain]), pooled)


def test_panels_show_every_site_and_setting(analysis):
    found = read_ranks(analysis, "vit_clean")
    figure = rank_curves(found, "vision")
    upper, lower = (axes for axes in np.array(figure.axes).reshape(2, 2))
    assert [len(axis.lines) for axis in upper] == [3, 3] and "for minmax" in upper[1].get_title(loc="left")
    _, sqnr, gain = found[Setting("minmax", 4, 8, "vision_text")]["vision/output"].pooled()
    np.testing.assert_allclose(upper[0].lines[2].get_ydata(), sqnr)
    np.testing.assert_allclose(lower[0].lines[3].get_ydata(), gain)  # the first line is that of gain 1
    assert np.median(gain) < 0.85 < 0.95 < np.median(lower[1].lines[3].get_ydata())
    assert rank_curves(found, "audio") is None and rank_curves({}, "vision") is None and rank_maps({}) is None
    maps = rank_maps(found)
    images = [axis.images[0] for axis in maps.axes if axis.images and len(axis.get_yticks()) == len(SITES)]
    assert [image.get_array().shape for image in images] == [(4, 48)] * 4
    assert sum(images[2].get_clim()) / 2 == pytest.approx(1)  # white is not damped


def test_they_stand_in_the_section_of_spectra(analysis):
    html = spectra_section(analysis)
    assert html.count("<figure>") == 5  # weights: ratios and heatmaps; activations: a tower each, and maps
    assert "the gain is below 1 only where a rank is damped" in html


def test_captions_say_what_convolutions_spectra_are_of():
    values = np.linspace(2.0, 1.0, 5)
    for group in ("vision/conv", "vision/mlp"):
        spectra = {Setting("minmax", 4, 8, "vision"): {"model.visual.stem": LayerCurve(group, 1.1 * values, values)}}
        html = _weight_spectra(spectra, "convnext_clean", "where")
        assert html.count("unrolled kernel matrix") == (2 if group == "vision/conv" else 0)
