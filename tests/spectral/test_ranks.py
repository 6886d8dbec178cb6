"""The table of ranks on activations whose filter and noise are known."""

import math

import numpy as np
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import SecondMoments, rank_table

D = 16


@pytest.fixture(scope="module")
def signal():
    """Activations ``[20000, 16]`` whose principal directions are known up to sampling: a turned, falling spectrum."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -2, D, dtype=torch.float64)
    return torch.randn(20_000, D, generator=generator, dtype=torch.float64) * scales @ turn + 1.5


def noise_like(z, seed=5):
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_basis(z):
    moments = SecondMoments(D)
    moments.update(z, z)
    return rank_table(moments).basis


def table_of(z, q, **options):
    moments = SecondMoments(D)
    moments.update(z, q)
    return rank_table(moments, **options)


def test_definitions_agree_with_numpy(signal):
    z = signal[:300]
    q = z + 0.02 * noise_like(z)
    table = table_of(z, q)
    centred, error = (z - z.mean(0)).numpy(), ((q - z) - (q - z).mean(0)).numpy()
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(table.energy.numpy(), s**2, rtol=1e-9)
    parts = error @ vt.T
    np.testing.assert_allclose(table.noise.numpy(), (parts**2).sum(0), rtol=1e-7)
    slopes = [np.polyfit(centred @ v, (centred + error) @ v, 1)[0] for v in vt]
    np.testing.assert_allclose(table.gain.numpy(), slopes, rtol=1e-8)
    assert table.mean_sqnr_db == pytest.approx(10 * np.log10((s**2).sum() / (error**2).sum()))
    np.testing.assert_allclose(table.sqnr_db.numpy(), 10 * np.log10(s**2 / (parts**2).sum(0)), rtol=1e-7)


def test_white_noise_has_gain_one_and_no_colour(signal):
    table = table_of(signal, signal + 0.01 * noise_like(signal))
    z_scores = (table.gain - 1) / table.gain_stderr
    assert z_scores.abs().max() < 4 and 0.4 < z_scores.std() < 1.7
    assert abs(table.colour) < 0.01
    assert table.filter_share.max() < 0.01
    assert (table.sqnr_db.diff() < 0).all()  # it falls although nothing is filtered
    torch.testing.assert_close(table.noise, torch.full((D,), 0.01**2 * 20_000, dtype=torch.float64), rtol=0.05, atol=0)


def test_the_standard_error_is_that_of_repetitions(signal):
    z = signal[:100]
    tables = [table_of(z, z + 0.05 * noise_like(z, seed)) for seed in range(300)]
    spread = torch.stack([table.gain for table in tables]).std(0)
    claimed = torch.stack([table.gain_stderr for table in tables]).mean(0)
    torch.testing.assert_close(spread, claimed, rtol=0.2, atol=0)


def test_a_filter_is_recovered_whole(signal):
    basis, filtered = own_basis(signal), torch.linspace(1.05, 0.3, D, dtype=torch.float64)
    mean = signal.mean(0)
    table = table_of(signal, mean + (signal - mean) @ basis * filtered @ basis.mT)
    torch.testing.assert_close(table.gain, filtered, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(table.filter_share, torch.ones(D, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(table.sqnr_db, -20 * (1 - filtered).abs().log10(), rtol=1e-5, atol=1e-5)


def test_a_constant_filter_has_constant_sqnr_and_colour_one(signal):
    mean = signal.mean(0)
    table = table_of(signal, mean + 0.9 * (signal - mean))
    torch.testing.assert_close(table.sqnr_db, torch.full((D,), 20.0, dtype=torch.float64))
    assert table.colour == pytest.approx(1)


def test_filter_and_noise_together_are_both_recovered(signal):
    basis, filtered = own_basis(signal), torch.linspace(1.0, 0.6, D, dtype=torch.float64)
    mean, noise = signal.mean(0), 0.01 * noise_like(signal)
    table = table_of(signal, mean + (signal - mean) @ basis * filtered @ basis.mT + noise)
    assert ((table.gain - filtered).abs() < 4 * table.gain_stderr).all()
    torch.testing.assert_close(
        table.incoherent_noise, torch.full((D,), 0.01**2 * 20_000, dtype=torch.float64), rtol=0.05, atol=0
    )
    expected = (1 - filtered).square() * table.energy / table.noise
    torch.testing.assert_close(table.filter_share, expected, rtol=0.1, atol=0.01)


def test_gain_and_noise_do_not_depend_on_the_mean_unless_asked(signal):
    z, q = signal[:500], signal[:500] + 0.01 * noise_like(signal[:500])
    shifted = table_of(z + 7, q + 9)  # the shift is an error of its own, which only the plain table sees
    torch.testing.assert_close(shifted.gain, table_of(z, q).gain, rtol=1e-8, atol=1e-10)
    assert table_of(z + 7, q + 9, centred=False).total_noise > 1000 * shifted.total_noise


def test_another_basis_only_changes_directions(signal):
    turn = torch.linalg.qr(noise_like(torch.empty(D, D))).Q
    z, q = signal[:500], signal[:500] + 0.01 * noise_like(signal[:500])
    turned, own = table_of(z, q, basis=turn), table_of(z, q)
    assert float(turned.noise.sum()) == pytest.approx(float(own.noise.sum()))
    assert float(turned.energy.sum()) == pytest.approx(float(own.energy.sum()))
    with pytest.raises(VLMQError, match="do not fit"):
        table_of(z, q, basis=torch.eye(3))


def test_a_band_pools_its_ranks(signal):
    z = signal[:400]
    table = table_of(z, z + 0.02 * noise_like(z))
    sqnr, gain, _, share = table.pooled(4, None)
    energy, noise, coherent = (t[4:].sum() for t in (table.energy, table.noise, table.coherent))
    assert sqnr == pytest.approx(float(10 * (energy / noise).log10()))
    assert gain == pytest.approx(float(1 + coherent / energy))
    assert 0 < share < 0.05
    one = (table.sqnr_db, table.gain, table.gain_stderr, table.filter_share)
    assert table.pooled(4, 5) == pytest.approx([float(t[4]) for t in one])
    assert all(math.isnan(value) for value in table.pooled(99, None))


def test_a_filter_that_differs_inside_a_band_is_all_filter(signal):
    basis, filtered = own_basis(signal), torch.linspace(1.3, 0.5, D, dtype=torch.float64)
    mean = signal.mean(0)
    filtered_alone = mean + (signal - mean) @ basis * filtered @ basis.mT
    assert table_of(signal, filtered_alone).pooled(2, None)[3] == pytest.approx(1)


def test_the_standard_error_of_a_band_is_that_of_repetitions(signal):
    """Noise that is correlated between ranks included: one draw for all of them."""
    z = signal[:100]
    mix = torch.ones(D, D, dtype=torch.float64) + torch.eye(D, dtype=torch.float64)
    pooled = [table_of(z, z + 0.02 * noise_like(z, seed) @ mix).pooled(4, None) for seed in range(300)]
    gains, claimed = (torch.tensor([p[k] for p in pooled]) for k in (1, 2))
    assert float(gains.std()) == pytest.approx(float(claimed.mean()), rel=0.15)


def test_no_error_one_sample_and_no_signal():
    z = torch.randn(30, D, dtype=torch.float64)
    same = table_of(z, z)
    assert same.sqnr_db.eq(math.inf).all() and same.gain.eq(1).all() and same.mean_sqnr_db == math.inf
    assert same.filter_share.isnan().all() and math.isnan(same.colour)
    one = table_of(z[:1], z[:1] + 0.1, centred=False)
    assert len(one) == 1 and one.gain_stderr.isnan().all()
    nothing = table_of(torch.zeros(5, D), torch.ones(5, D), centred=False)
    assert len(nothing) == 0 and math.isnan(nothing.mean_sqnr_db) and nothing.total_noise == pytest.approx(5 * D)


def test_ranks_the_signal_lacks_are_left_out():
    z = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, D, dtype=torch.float64)
    assert len(table_of(z, z + 0.1 * noise_like(z))) == 4
