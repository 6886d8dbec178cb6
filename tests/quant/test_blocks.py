"""Activations after blocks, on every family of the zoo."""

import pytest
import torch
from cases.quant import build, make_batches, twin

from lightning_vlmq.evaluation.band_accuracy import measure_bands, measure_block_bands, project_at
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.quant.blocks import BlockWatcher, block_sites, features_with, on_grid, run_tower, watched
from lightning_vlmq.spectral import eigenbasis, rank_table

FAMILIES = ("vit_clean", "convnext_clean", "siglip_clean", "coca_clean", "align_clean")


def both(name="vit_clean", method="minmax", **scheme):
    reference = build(name)
    vlm = twin(reference)
    scheme = {"weight_bits": 4, "act_bits": 8, "scope": "vision_text", **scheme}
    quantize(vlm, method, QuantScheme(**scheme), make_batches(reference))
    return reference, vlm.eval()


def outputs_of(vlm, sites, tower, batches):
    seen = {}

    def look(site, rows):
        seen.setdefault(site, []).append(rows)

    with torch.no_grad(), watched(vlm, sites, look):
        for inputs in batches:
            run_tower(vlm, tower, inputs)
    return {site: torch.cat(rows) for site, rows in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family_is_seen(family):
    vlm = build(family)
    images = make_batches(vlm, (3,))[0]
    for tower, inputs in (("vision", images["image"]), ("text", images["tokens"])):
        sites = block_sites(vlm, tower)
        assert len(sites) >= 2 and next(iter(sites)) == f"{tower}/block 0"
        assert not any(vlm.in_decoder(name) for name in sites.values())
        seen = outputs_of(vlm, sites, tower, [inputs])
        assert set(seen) == set(sites)
        assert all(rows.shape[0] == 3 for rows in seen.values())


@pytest.mark.parametrize("family", ("vit_clean", "convnext_clean"))
def test_moments_are_those_of_the_activations(family):
    reference, vlm = both(family)
    batches = make_batches(reference, (5, 4))
    watcher = BlockWatcher(reference, vlm, "vision")
    for batch in batches:
        watcher.update(batch["image"])
    site = list(watcher.moments)[1]
    collected = {}
    for which, model in (("full", reference), ("quantized", vlm)):
        sites = {site: block_sites(model, "vision")[site]}
        rows = outputs_of(model, sites, "vision", [batch["image"] for batch in batches])[site]
        collected[which] = rows.reshape(-1, rows.shape[-1]).double()
    z, d = collected["full"], collected["quantized"] - collected["full"]
    z, d = z - z.mean(0), d - d.mean(0)
    assert watcher.moments[site].n == 9 and watcher.moments[site].rows == len(z)
    for mine, theirs in zip(watcher.moments[site].matrices(), (z.T @ z, z.T @ d, d.T @ d)):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * float(theirs.abs().max()))
    frequencies = watcher.fourier_spectra()[site]
    assert torch.isfinite(frequencies[0].power).all() and len(frequencies[0].power) >= 2


def test_a_model_beside_itself_has_no_error():
    reference = build("vit_clean")
    watcher = BlockWatcher(reference, twin(reference), "text")
    watcher.update(make_batches(reference, (4,))[0]["tokens"])
    assert all(rank_table(moments).total_noise == 0 for moments in watcher.moments.values())


@pytest.mark.parametrize("family", ("vit_clean", "siglip_clean"))
def test_a_rotated_stream_is_turned_back(family):
    reference, vlm = both(family, "quarot", weight_bits=8)
    watcher = BlockWatcher(reference, vlm, "vision")
    watcher.update(make_batches(reference, (6,))[0]["image"])
    for site, moments in watcher.moments.items():
        assert rank_table(moments).mean_sqnr_db > 15, site  # not turned back, it would be about -3 dB


def test_grids():
    assert on_grid(torch.zeros(2, 16, 5)).shape == on_grid(torch.zeros(2, 17, 5)).shape == (2, 5, 4, 4)
    assert on_grid(torch.zeros(2, 4, 6, 5)).shape == (2, 5, 4, 6)
    assert on_grid(torch.zeros(2, 7, 5)) is None and on_grid(torch.zeros(2, 5)) is None
    assert on_grid(torch.zeros(2, 1, 1, 5)) is None
    tokens = torch.arange(10.0).view(1, 10, 1)  # a class token, then rows of the grid
    assert on_grid(tokens)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["minmax", "quarot"])
def test_all_bands_kept_is_the_model(family, method):
    reference, vlm = both(family, method)
    batches = [batch["image"] for batch in make_batches(reference, (6, 5))]
    classifier = torch.nn.functional.normalize(torch.randn(7, run_tower(vlm, "vision", batches[0]).shape[1]), dim=-1)
    scale = float(vlm.logit_scale().detach())
    plain = scale * torch.cat([run_tower(vlm, "vision", images) for images in batches]) @ classifier.T
    watcher = BlockWatcher(reference, vlm, "vision", fourier=False)
    for images in batches:
        watcher.update(images)
    with torch.no_grad():
        for site, moments in watcher.moments.items():
            whole = eigenbasis(moments.quantized())[1]
            mean = moments.mean_z + moments.mean_d
            features = project_at(vlm, site, batches, whole, mean, watcher)
            error = (scale * features @ classifier.T - plain).abs().max()
            assert error < 1e-5 * max(1.0, float(plain.abs().max())) or (method == "quarot" and error < 0.2), site


def test_band_accuracies_of_a_small_model():
    reference, vlm = both()
    batches = [batch["image"] for batch in make_batches(reference, (8, 8))]
    with torch.no_grad():
        features = [torch.cat([run_tower(m, "vision", x) for x in batches]) for m in (reference, vlm)]
    classifier = torch.nn.functional.normalize(torch.randn(5, features[0].shape[1]), dim=-1)
    target = (features[0] @ classifier.T).argmax(-1)
    bands = ((0, 4), (4, 16), (16, None))
    how = (target, (classifier, classifier), bands)
    found = measure_block_bands(reference, vlm, batches, *how) + measure_bands(tuple(features), *how)
    sites = len(block_sites(vlm, "vision")) + 1
    assert len(found) == sites * 2 * ((9 + 3) + (18 + 3))
    by = {(f.site, f.around, f.basis, f.mode, f.band, f.model): f.top1 for f in found}
    expected = float(((features[1] @ classifier.T).argmax(-1) == target).double().mean())
    for site, around in {(f.site, f.around) for f in found}:
        last = "4-16" if site == "vision/output" else "16+"  # 16 images have 16 directions, their many tokens more
        assert by[site, around, "full", "cumulative", last, "full"] == 1.0
        assert by[site, around, "own", "cumulative", last, "quantized"] == pytest.approx(expected, abs=1 / 16)
        lacks = [f.top1 != f.top1 for f in found if (f.site, f.around, f.band) == (site, around, "16+")]
        assert set(lacks) == {site == "vision/output"} or set(lacks) == {
            True,
            False,
        }  # noise has energy on another's basis
    again = measure_block_bands(reference, vlm, batches, *how) + measure_bands(tuple(features), *how)
    assert str(again) == str(found)


def test_changed_activations_change_features():
    vlm = build("convnext_clean")
    images = make_batches(vlm, (4,))[0]["image"]
    site = block_sites(vlm, "vision")
    first = {"vision/block 0": site["vision/block 0"]}
    plain = features_with(vlm, [images], first, lambda _, rows: None)
    torch.testing.assert_close(features_with(vlm, [images], first, lambda _, rows: rows.clone()), plain)
    assert (features_with(vlm, [images], first, lambda _, rows: rows * 0) - plain).abs().max() > 1e-3
