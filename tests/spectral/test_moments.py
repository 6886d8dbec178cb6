import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import SecondMoments, TotalMoments, eigenbasis, rank_table


def activations(n=200, d=12, mean=0.0, error=0.01, seed=0, decay=2.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -decay, d, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    z = z @ turned + mean
    return z, z + error * torch.randn(n, d, generator=generator, dtype=torch.float64)


def streamed(z, q, batch):
    moments = SecondMoments(z.shape[-1])
    for start in range(0, len(z), batch):
        moments.update(z[start : start + batch], q[start : start + batch])
    return moments


@pytest.mark.parametrize("batch", [1, 7, 200])
@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_those_of_all_samples_at_once(batch, centred):
    z, q = activations(mean=3.0)
    found = streamed(z, q, batch)
    z, d = z.numpy(), (q - z).numpy()
    if centred:
        z, d = z - z.mean(0), d - d.mean(0)
    for mine, theirs in zip(found.matrices(centred), (z.T @ z, z.T @ d, d.T @ d)):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.quantized(centred).numpy(), (z + d).T @ (z + d), rtol=1e-9, atol=1e-11)
    assert (found.n, found.rows) == (200, 200)


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("centred", [True, False])
def test_eigenvalues_are_those_of_a_full_svd(mean, centred):
    z, q = activations(n=500, d=24, mean=mean, decay=5)  # energies over ten decades
    values, vectors = eigenbasis(streamed(z, q, 32).matrices(centred)[0])
    exact = np.linalg.svd((z - z.mean(0) if centred else z).numpy(), compute_uv=False) ** 2
    kept = exact > 1e-7 * exact[0]
    assert kept.sum() >= 8 or not centred
    np.testing.assert_allclose(values.numpy()[kept], exact[kept], rtol=1e-8)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(24, dtype=torch.float64))


def test_a_small_error_keeps_its_digits():
    z, _ = activations(mean=50.0)
    d = 1e-9 * torch.randn_like(z)
    q = z + d
    _, _, dd = streamed(z, q, 16).matrices(centred=False)
    exact = (q - z).numpy()
    np.testing.assert_allclose(dd.numpy(), exact.T @ exact, rtol=1e-9, atol=1e-30)


def test_tokens_are_rows_of_one_sample():
    z, q = activations(n=60)
    moments = SecondMoments(12)
    moments.update(z.view(10, 6, 12).float(), q.view(10, 6, 12).float())
    assert (moments.n, moments.rows) == (10, 60)
    torch.testing.assert_close(moments.matrices()[0], streamed(z.float(), q.float(), 60).matrices()[0])


def test_merging_is_seeing_everything():
    z, q = activations(mean=2.0)
    whole, first, second = streamed(z, q, 9), streamed(z[:50], q[:50], 9), streamed(z[50:], q[50:], 9)
    first.merge(second)
    first.merge(SecondMoments(12))  # one that has seen nothing
    empty = SecondMoments(12)
    empty.merge(first)
    for mine, theirs in zip(empty.matrices(), whole.matrices()):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert (empty.n, empty.rows) == (200, 200)


def _share(rank, size, path, folder):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    z, q = activations(mean=2.0)
    cuts = [0, 30, 200, 200]  # the third process has nothing
    moments = streamed(z[cuts[rank] : cuts[rank + 1]], q[cuts[rank] : cuts[rank + 1]], 9)
    moments.synchronise()
    torch.save([*moments.matrices(), torch.tensor([moments.n, moments.rows])], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_add_up(tmp_path):
    mp.spawn(_share, (3, tmp_path / "store", tmp_path), nprocs=3)
    z, q = activations(mean=2.0)
    for rank in range(3):
        *found, counts = torch.load(tmp_path / f"{rank}.pt")
        for mine, theirs in zip(found, streamed(z, q, 200).matrices()):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert counts.tolist() == [200, 200]


def test_alone_there_is_nothing_to_add():
    moments = streamed(*activations(), 20)
    before = moments.matrices()[0].clone()
    moments.synchronise()
    assert torch.equal(moments.matrices()[0], before)


def test_the_basis_has_one_sign():
    moment = streamed(*activations(), 20).matrices()[0]
    flipped = torch.diag(torch.tensor([1.0, -1.0] * 6, dtype=torch.float64))
    _, vectors = eigenbasis(moment)
    _, mirrored = eigenbasis(flipped @ moment @ flipped)
    torch.testing.assert_close((flipped @ vectors).abs(), mirrored.abs())
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: SecondMoments(0),
        lambda: SecondMoments(3).matrices(),
        lambda: SecondMoments(3).update(torch.ones(2, 3), torch.ones(3, 3)),
        lambda: SecondMoments(3).update(torch.ones(2, 4), torch.ones(2, 4)),
        lambda: SecondMoments(3).update(torch.ones(3), torch.ones(3)),
        lambda: SecondMoments(3).update(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)),
        lambda: SecondMoments(3).update(torch.ones(2, 3), torch.full((2, 3), torch.nan)),
        lambda: SecondMoments(3).update(torch.full((2, 3), torch.inf), torch.ones(2, 3)),
        lambda: SecondMoments(3).merge(SecondMoments(4)),
        lambda: eigenbasis(torch.ones(2, 3)),
        lambda: eigenbasis(torch.full((2, 2), torch.nan)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(VLMQError):
        call()


def test_an_empty_batch_changes_nothing():
    moments = SecondMoments(3)
    moments.update(torch.ones(0, 3), torch.ones(0, 3))
    assert (moments.n, moments.rows) == (0, 0)


def test_totals_are_those_of_the_matrices():
    """Batch by batch, with a mean a thousand times the spread; and what has no error or no signal."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 3, 7, generator=generator, dtype=torch.float64) + 1000
    q = z + 0.01 * torch.randn(z.shape, generator=generator, dtype=torch.float64) + 5
    moments, totals = SecondMoments(7), TotalMoments(7)
    for part in (slice(0, 1), slice(1, 30), slice(30, 30), slice(30, None)):
        moments.update(z[part], q[part])
        totals.update(z[part], q[part])
    assert totals.rows == moments.rows == 150
    assert totals.mean_sqnr_db == pytest.approx(rank_table(moments).mean_sqnr_db, rel=1e-10)
    same, nothing = TotalMoments(7), TotalMoments(7)
    same.update(z, z)
    nothing.update(torch.ones(4, 7), torch.zeros(4, 7))
    assert same.mean_sqnr_db == math.inf and math.isnan(nothing.mean_sqnr_db)
    for bad in (z[..., :6], z.long(), z * math.nan):
        with pytest.raises(VLMQError):
            totals.update(bad, bad)
