"""Surgery on errors whose parts are known."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import SecondMoments, Surgery, rank_table

D = 10
BANDS = ((0, 3), (3, 6), (6, None))


def both(n=4000, filtered=None, noise=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    scores = torch.randn(n, D, generator=generator, dtype=torch.float64)
    scores = torch.linalg.qr(scores - scores.mean(0)).Q * n**0.5 * torch.logspace(0, -1.5, D, dtype=torch.float64)
    z = scores @ turn + 0.7  # its principal directions are the rows of turn, exactly
    gains = torch.ones(D, dtype=torch.float64) if filtered is None else filtered
    error = scores * (gains - 1) @ turn
    return z, z + error + noise * torch.randn(n, D, generator=generator, dtype=torch.float64)


def learn(z, q, bands=BANDS):
    moments = SecondMoments(D)
    moments.update(z, q)
    return Surgery.learn(moments, bands), rank_table(moments)


def noise_per_rank(surgery, z, q):
    return ((q - z) @ surgery.directions).square().sum(0)


def test_healing_removes_the_error_of_the_band_and_no_other():
    z, q = both()
    surgery, _ = learn(z, q)
    whole = noise_per_rank(surgery, z, q)
    for k, band in enumerate(BANDS):
        healed = noise_per_rank(surgery, z, surgery.operate(surgery.names[k], z, q))
        hurt = noise_per_rank(surgery, z, surgery.operate(surgery.names[3 + k], z, q))
        inside = torch.zeros(D, dtype=torch.bool)
        inside[slice(*band)] = True
        assert healed[inside].max() < 1e-20 * whole.max()
        torch.testing.assert_close(healed[~inside], whole[~inside])
        assert hurt[~inside].max() < 1e-20 * whole.max()
        torch.testing.assert_close(hurt[inside], whole[inside])


def test_all_bands_hurt_are_the_quantized_model():
    z, q = both()
    surgery, _ = learn(z, q)
    errors = [surgery.operate(name, z, q) - z for name in surgery.names if name.startswith("hurt")]
    torch.testing.assert_close(z + sum(errors), q)
    torch.testing.assert_close(surgery.operate("whole", z, q), q)


def test_parts_of_a_change_add_up_to_that_of_the_whole_error():
    """The mean true-class cosine of normalised features, linear in a small error; with the classes of full precision."""
    z, q = both(n=600, filtered=torch.linspace(1.0, 0.9, D, dtype=torch.float64), noise=0.002)
    surgery, _ = learn(z, q)
    classes = normalize(torch.randn(7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    target = (normalize(z, dim=-1) @ classes.T).argmax(-1)

    def change(name):
        before, after = (normalize(x, dim=-1) @ classes.T for x in (z, surgery.operate(name, z, q)))
        return float((after - before)[torch.arange(len(z)), target].mean())

    whole = change("whole")
    assert abs(whole) > 1e-4
    assert sum(change(name) for name in surgery.names if name.startswith("hurt")) / whole == pytest.approx(1, abs=0.05)
    assert (change("coherent") + change("incoherent")) / whole == pytest.approx(1, abs=0.05)
    for band in ("0-3", "3-6", "6+"):
        assert (change(f"heal {band}") + change(f"hurt {band}")) / whole == pytest.approx(1, abs=0.05)


def test_filter_and_noise_come_apart():
    filtered = torch.linspace(1.0, 0.5, D, dtype=torch.float64)
    z, q = both(filtered=filtered)
    clean, _ = both(filtered=filtered, noise=0.0)[1], None
    surgery, _ = learn(z, q)
    coherent, incoherent = (surgery.operate(name, z, q) for name in ("coherent", "incoherent"))
    torch.testing.assert_close(coherent + incoherent, z + q)
    assert (coherent - clean).square().mean() < 0.02 * (q - clean).square().mean()
    moments = SecondMoments(D)
    moments.update(z, incoherent)
    assert (rank_table(moments).gain - 1).abs().max() < 1e-9  # no filter is left
    moments = SecondMoments(D)
    moments.update(z, coherent)
    torch.testing.assert_close(rank_table(moments).filter_share, torch.ones(D, dtype=torch.float64))


def test_what_is_learnt_on_one_set_is_done_to_another():
    z, q = both()
    surgery, _ = learn(z[:2000], q[:2000])
    other = surgery.operate("heal 0-3", z[2000:].float(), q[2000:].float())
    assert other.dtype == torch.float32
    assert noise_per_rank(surgery, z[2000:], other.double())[:3].max() < 1e-6


def test_directions_without_energy_have_no_filter():
    z, q = both()
    flat = z.clone()
    surgery, _ = learn(flat, q)
    moments = SecondMoments(D)
    low = flat @ surgery.directions[:, :4] @ surgery.directions[:, :4].mT
    moments.update(low, low + 0.01 * (q - z))
    assert Surgery.learn(moments).gain[4:].eq(1).all()


def test_bad_input_is_refused():
    z, q = both(n=50)
    surgery, _ = learn(z, q)
    with pytest.raises(VLMQError, match="unknown surgery"):
        surgery.operate("heal 1-2", z, q)
    with pytest.raises(VLMQError, match="same samples"):
        surgery.operate("coherent", z, q[:3])
    with pytest.raises(VLMQError, match="no activations"):
        Surgery.learn(SecondMoments(3))
