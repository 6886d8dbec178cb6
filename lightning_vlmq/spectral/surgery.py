"""Error surgery: quantized features with their error healed in some ranks, or hurt in these alone.

If filtering of high ranks makes a model's gains, healing the high ranks removes them and healing the low ranks keeps
them. Nothing but the features of both models is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral.bands import PUBLISHED_BANDS, Band, band_directions, band_name
from lightning_vlmq.spectral.moments import SecondMoments, eigenbasis
from lightning_vlmq.spectral.ranks import rank_table

WHOLE = "whole"
"""The surgery that leaves the error as it is: what the others are parts of."""


@dataclass(frozen=True, eq=False)
class Surgery:
    """What is cut, learnt on one set of samples and then done to any other of the same two models.

    Attributes:
        directions: float64 ``[d, d]``, full precision's principal directions, complete.
        gain: float64 ``[d]``, per direction; 1 where full precision has no energy to measure it on.
        mean: float64 ``[d]``, mean of the full-precision features.
        bands: the ranges of ranks that are healed or hurt.
    """

    directions: Tensor
    gain: Tensor
    mean: Tensor
    bands: tuple[Band, ...] = PUBLISHED_BANDS

    @classmethod
    def learn(cls, moments: SecondMoments, bands: Sequence[Band] = PUBLISHED_BANDS) -> Surgery:
        """From the centred second moments of both models' features. Raises :class:`VLMQError` without samples."""
        directions = eigenbasis(moments.matrices()[0])[1]
        table = rank_table(moments, basis=directions)
        gain = torch.ones(moments.dim, dtype=torch.float64, device=directions.device)
        gain[: len(table)] = table.gain  # the ranks left out are the last ones
        return cls(directions, gain, moments.mean_z.clone(), tuple(bands))

    @property
    def names(self) -> tuple[str, ...]:
        """What :meth:`operate` makes, in order."""
        each = [f"{kind} {band_name(band)}" for kind in ("heal", "hurt") for band in self.bands]
        return (*each, "coherent", "incoherent", WHOLE)

    def operate(self, name: str, full: Tensor, quantized: Tensor) -> Tensor:
        """Features with part of the error ``D = Q - Z`` left in.

        * ``heal 0-8``: ``Z + D (I - V V^T)``, V the directions of the band: no error there.
        * ``hurt 0-8``: ``Z + D V V^T``: error there alone.
        * ``coherent``: ``Z + (Z - mean) V diag(gain - 1) V^T``, the filter without the noise.
        * ``incoherent``: ``Q`` less what ``coherent`` adds to ``Z``, the noise without the filter.
        * ``whole``: ``Q``.

        Args:
            name: one of :attr:`names`.
            full: float ``[n, d]``, Z.
            quantized: float ``[n, d]``, Q, of the same samples.

        Returns:
            ``[n, d]`` in the dtype of ``full``, computed in float64; not normalised.

        Raises:
            VLMQError: an unknown name, or features that do not fit.
        """
        if full.shape != quantized.shape or full.shape[-1] != len(self.mean):
            raise VLMQError(
                f"features {list(full.shape)} and quantized features {list(quantized.shape)} must be "
                f"[n, {len(self.mean)}] of the same samples"
            )
        z = full.to(self.directions)
        d = quantized.to(self.directions) - z
        if name == WHOLE:
            return (z + d).to(full)
        if name in ("coherent", "incoherent"):
            filtered = (z - self.mean) @ (self.directions * (self.gain - 1)) @ self.directions.mT
            return (z + filtered if name == "coherent" else z + d - filtered).to(full)
        found = {f"{kind} {band_name(band)}": (kind, band) for kind in ("heal", "hurt") for band in self.bands}
        if name not in found:
            raise VLMQError(f"unknown surgery '{name}'; known: {', '.join(self.names)}")
        kind, band = found[name]
        cut = band_directions(self.directions, band)
        inside = d @ cut @ cut.mT
        return (z + (d - inside if kind == "heal" else inside)).to(full)
