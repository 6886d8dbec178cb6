"""Second moments of full-precision activations and of what quantization adds to them, streamed batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_vlmq.core.errors import VLMQError

EIGENVALUE_FLOOR = 1e-7
"""Eigenvalues below this share of the largest are left out of tables and fits: a Gram matrix cannot resolve them."""


class SecondMoments:
    """``Z^T Z``, ``Z^T D``, ``D^T D`` and the means of activations Z and of quantization's error ``D = Q - Z``.

    Everything is kept in float64 around running means (Chan, Golub & LeVeque 1983), so that neither a large mean nor a
    small error costs digits; no activation is kept. D itself is accumulated: from ``Q^T Q`` its digits could not be had
    back. Eigenvalues are those of a full SVD to 1e-8 relative as far down as 1e-7 of the largest; a Gram matrix squares
    the condition number, so that below that it cannot give them.

    Args:
        dim: width d of the activations.
        device: where the sums live.

    Attributes:
        n: independent samples (images or texts) taken in.
        rows: vectors taken in; more than ``n`` where every sample has several (tokens, pixels of a map).
        mean_z: float64 ``[d]``, mean of Z over rows.
        mean_d: float64 ``[d]``, mean of D over rows.

    Raises:
        VLMQError: if ``dim`` is not positive.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise VLMQError(f"activations need at least one dimension, not {dim}")
        self.dim, self.n, self.rows = dim, 0, 0
        self.mean_z = torch.zeros(dim, dtype=torch.float64, device=device)
        self.mean_d = torch.zeros_like(self.mean_z)
        self._sums = torch.zeros(3, dim, dim, dtype=torch.float64, device=device)  # zz, zd, dd around the means

    def update(self, full: Tensor, quantized: Tensor) -> None:
        """Take in one batch.

        Args:
            full: float ``[samples, ..., d]``, full-precision activations; axes between the first and the last are rows
                of one sample. An empty batch changes nothing.
            quantized: the quantized model's activations of the same samples, the same shape.

        Raises:
            VLMQError: shapes differ or do not fit, or values are not finite floats.
        """
        z, d = rows_of(full, quantized, self.dim, self.mean_z)
        if not len(z):
            return
        mean_z, mean_d = z.mean(0), d.mean(0)
        _require_finite(torch.stack([mean_z, mean_d]))
        z, d = z - mean_z, d - mean_d
        self._add(len(full), len(z), mean_z, mean_d, torch.stack([z.mT @ z, z.mT @ d, d.mT @ d]))

    def merge(self, other: SecondMoments) -> None:
        """Take in what another accumulator has seen (of other samples). Raises :class:`VLMQError` for another width."""
        if other.dim != self.dim:
            raise VLMQError(f"moments of width {other.dim} cannot be added to those of width {self.dim}")
        if other.rows:
            self._add(other.n, other.rows, other.mean_z, other.mean_d, other._sums)

    def _add(self, n: int, rows: int, mean_z: Tensor, mean_d: Tensor, sums: Tensor) -> None:
        total = self.rows + rows
        step_z, step_d = mean_z.to(self.mean_z) - self.mean_z, mean_d.to(self.mean_z) - self.mean_d
        self._sums += sums.to(self._sums) + self.rows * rows / total * _products(step_z, step_d)
        self.mean_z += step_z * (rows / total)
        self.mean_d += step_d * (rows / total)
        self.n, self.rows = self.n + n, total

    def synchronise(self) -> None:
        """Add up over all processes of the default group, in place; alone it changes nothing.

        Every process has to call it. Sums around each process's own means are moved to the common mean first.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        own = torch.cat([self.mean_z * self.rows, self.mean_d * self.rows, self.mean_z.new_tensor([self.rows, self.n])])
        dist.all_reduce(own)
        rows = float(own[-2])
        if rows == 0:
            return
        mean_z, mean_d = own[: self.dim] / rows, own[self.dim : 2 * self.dim] / rows
        self._sums += self.rows * _products(self.mean_z - mean_z, self.mean_d - mean_d)
        dist.all_reduce(self._sums)
        self.mean_z, self.mean_d, self.rows, self.n = mean_z, mean_d, int(rows), int(own[-1])

    def matrices(self, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """``(Z^T Z, Z^T D, D^T D)``, float64 ``[d, d]`` each: around the means, or of the activations as they are.

        Raises:
            VLMQError: nothing has been taken in yet.
        """
        if not self.rows:
            raise VLMQError("no activations have been taken in; run the models over at least one sample first")
        sums = self._sums if centred else self._sums + self.rows * _products(self.mean_z, self.mean_d)
        zz, zd, dd = sums.unbind(0)
        return zz, zd, dd

    def quantized(self, centred: bool = True) -> Tensor:
        """``Q^T Q``, float64 ``[d, d]``, of the quantized activations Q = Z + D; see :meth:`matrices`."""
        zz, zd, dd = self.matrices(centred)
        return zz + zd + zd.mT + dd


class TotalMoments:
    """Total signal and total error around their means: what :class:`SecondMoments` knows of all directions together, at a row's cost.

    Args:
        dim: width d of the activations.
        device: where the sums live.

    Attributes:
        rows: vectors taken in.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim, self.rows = dim, 0
        self._means = torch.zeros(2, dim, dtype=torch.float64, device=device)
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, full: Tensor, quantized: Tensor) -> None:
        """Take in one batch, as :meth:`SecondMoments.update` does; raises what that raises."""
        z, d = rows_of(full, quantized, self.dim, self._means)
        if not len(z):
            return
        parts = torch.stack([z, d])
        means = parts.mean(1)
        _require_finite(means)
        total = self.rows + len(z)
        step = means - self._means
        spread = (parts - means[:, None]).square().sum((1, 2))
        self._totals += spread + self.rows * len(z) / total * step.square().sum(-1)
        self._means += step * (len(z) / total)
        self.rows = total

    @property
    def mean_sqnr_db(self) -> float:
        """SQNR of all directions together in decibels, see :attr:`~lightning_vlmq.spectral.RankTable.mean_sqnr_db`."""
        energy, noise = self._totals.tolist()
        if energy == 0:
            return math.nan
        return 10 * math.log10(energy / noise) if noise > 0 else math.inf


def rows_of(full: Tensor, quantized: Tensor, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[rows, d]`` of full-precision activations and of the error that quantization adds, in the type and place of ``like``.

    Raises:
        VLMQError: shapes differ or do not fit, or values are not floats.
    """
    if full.shape != quantized.shape or full.ndim < 2 or full.shape[-1] != dim:
        raise VLMQError(
            f"activations {list(full.shape)} and quantized activations {list(quantized.shape)} must be "
            f"[samples, ..., {dim}] of the same samples"
        )
    if not (full.is_floating_point() and quantized.is_floating_point()):
        raise VLMQError(f"activations must be floating point, not {full.dtype} and {quantized.dtype}")
    z = full.detach().to(like).reshape(-1, dim)
    return z, quantized.detach().to(like).reshape(-1, dim) - z


def _require_finite(means: Tensor) -> None:
    if not torch.isfinite(means).all():
        raise VLMQError("activations hold NaN or infinity; check the model that made them")


def _products(z: Tensor, d: Tensor) -> Tensor:
    return torch.stack([torch.outer(z, z), torch.outer(z, d), torch.outer(d, d)])


def eigenbasis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and none negative, and eigenvectors of a symmetric second moment.

    Args:
        moment: float64 ``[d, d]``, symmetric, positive semi-definite up to rounding (negative eigenvalues are rounding
            and become 0).

    Returns:
        float64 ``[d]`` and ``[d, d]``, a column per eigenvalue. The sign of each column is fixed by its largest entry,
        so that the same moment gives the same basis on every machine.

    Raises:
        VLMQError: if the moment is not square or not finite.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not torch.isfinite(moment).all():
        raise VLMQError(f"a second moment is a finite square matrix, not of shape {list(moment.shape)}")
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)
