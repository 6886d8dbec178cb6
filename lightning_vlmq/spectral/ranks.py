"""What quantization does along each principal direction of the activations: damping, noise, and which of the two it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral.moments import EIGENVALUE_FLOOR, SecondMoments, eigenbasis


@dataclass(frozen=True, eq=False)
class RankTable:
    """Signal, error and their product along each principal direction ``v_k`` of the full-precision activations Z.

    A falling SQNR alone shows no filter: noise of any kind gives one, as the signal falls. The gain tells damping
    (below 1) from noise (1 within its standard error). All tensors are float64 ``[r]``, largest direction first.

    Attributes:
        basis: ``[d, r]``, the directions.
        energy: ``|Z v_k|^2``.
        noise: ``|D v_k|^2`` of the error D.
        coherent: ``v_k^T Z^T D v_k``, the part of the error that goes with the signal.
        n: independent samples behind the table; rows of one sample (tokens) count as one, which makes the standard
            errors those of the worst case that they say nothing new.
        total_energy: ``|Z|^2``, ranks below :data:`EIGENVALUE_FLOOR` included.
        total_noise: ``|D|^2``, likewise.
    """

    basis: Tensor
    energy: Tensor
    noise: Tensor
    coherent: Tensor
    n: int
    total_energy: float
    total_noise: float

    def __len__(self) -> int:
        """Number of ranks r."""
        return len(self.energy)

    def on_cpu(self) -> RankTable:
        """The same with its tensors on the CPU."""
        tensors = {name: getattr(self, name).cpu() for name in ("basis", "energy", "noise", "coherent")}
        return replace(self, **tensors)

    @property
    def sqnr_db(self) -> Tensor:
        """``10 log10(energy / noise)`` (arXiv 2509.21173); infinite where quantization changed nothing."""
        return 10 * (self.energy / self.noise).log10()

    @property
    def mean_sqnr_db(self) -> float:
        """SQNR of all directions together, in decibels; NaN without energy, infinite without error."""
        if self.total_energy == 0:
            return math.nan
        return 10 * math.log10(self.total_energy / self.total_noise) if self.total_noise > 0 else math.inf

    @property
    def gain(self) -> Tensor:
        """``1 + coherent / energy``: slope of the quantized on the full-precision coordinate, by least squares."""
        return 1 + self.coherent / self.energy

    @property
    def incoherent_noise(self) -> Tensor:
        """``noise - coherent^2 / energy``: what is left of the error when the gain's part is taken out."""
        return (self.noise - self.coherent.square() / self.energy).clamp_min(0)  # rounding, where D is all gain

    @property
    def gain_stderr(self) -> Tensor:
        """Standard error of the gain, ``sqrt(incoherent_noise / ((n - 1) energy))``; NaN for fewer than two samples."""
        if self.n < 2:
            return torch.full_like(self.energy, math.nan)
        return (self.incoherent_noise / ((self.n - 1) * self.energy)).sqrt()

    @property
    def filter_share(self) -> Tensor:
        """``(gain - 1)^2 energy / noise`` in [0, 1]: share of the error that a filter explains; NaN without error."""
        return (self.coherent.square() / (self.energy * self.noise)).clamp_max(1)

    @property
    def colour(self) -> float:
        """Slope of log noise on log energy: 0 for white noise, 1 for the same SQNR at every rank.

        NaN with fewer than two ranks that have noise, or with equal energies.
        """
        kept = (self.noise > 0) & (self.energy > 0)
        x, y = self.energy[kept].log(), self.noise[kept].log()
        spread = (x - x.mean()).square().sum() if len(x) > 1 else torch.zeros(())
        return float(((x - x.mean()) * y).sum() / spread) if spread > 0 else math.nan

    def pooled(self, start: int, stop: int | None) -> tuple[float, float, float, float]:
        """SQNR (dB), gain, its standard error and filter share of the ranks ``start`` to ``stop`` taken together.

        The gain is the energy-weighted mean of the ranks' own, ``sum(g_k lambda_k) / sum(lambda_k)``, its variance follows from theirs:
        coordinates on the eigenbasis are uncorrelated, so ranks add up however their noise is correlated. The filter share is that of
        a filter free to differ from rank to rank: 1 for any filter without noise.

        NaN where the range holds no rank.
        """
        part = slice(start, stop)
        if not len(self.energy[part]):
            return (math.nan,) * 4
        energy, noise = self.energy[part].sum(), self.noise[part].sum()
        stderr = math.nan
        if self.n > 1:
            stderr = float((self.incoherent_noise[part] * self.energy[part]).sum().div(self.n - 1).sqrt() / energy)
        share = (self.coherent[part].square() / self.energy[part]).sum() / noise
        gain = 1 + self.coherent[part].sum() / energy
        return float(10 * (energy / noise).log10()), float(gain), stderr, float(share.clamp_max(1))


def rank_table(moments: SecondMoments, centred: bool = True, basis: Tensor | None = None) -> RankTable:
    """Signal and error per rank.

    Args:
        moments: of both models on the same samples.
        centred: around the means, or of the activations as they are (as in arXiv 2509.21173).
        basis: float ``[d, r]`` with orthonormal columns to project on, e.g. the quantized model's; by default the
            eigenvectors of ``Z^T Z``.

    Returns:
        The table; directions whose energy is at most :data:`EIGENVALUE_FLOOR` of the largest are left out.

    Raises:
        VLMQError: no samples, or a basis that does not fit.
    """
    zz, zd, dd = moments.matrices(centred)
    if basis is None:
        basis = eigenbasis(zz)[1]
    elif basis.ndim != 2 or len(basis) != moments.dim:
        raise VLMQError(f"directions of shape {list(basis.shape)} do not fit activations of width {moments.dim}")
    basis = basis.to(zz)
    energy, coherent, noise = (((m @ basis) * basis).sum(0) for m in (zz, zd, dd))
    kept = energy > EIGENVALUE_FLOOR * energy.max()
    return RankTable(
        basis[:, kept],
        energy[kept],
        noise[kept].clamp_min(0),
        coherent[kept],
        moments.n,
        total_energy=float(zz.trace()),
        total_noise=float(dd.trace()),
    )
