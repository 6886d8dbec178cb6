"""Rotation, then LSQ ("Rot+LSQ")."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.quant.methods import register
from lightning_vlmq.quant.ptq.quarot import Rotated
from lightning_vlmq.quant.qat.lsq import LSQ


@register("rot_lsq_contrastive")
@register("rot_lsq_feature", distillation="feature")
@dataclass(frozen=True)
class RotLSQ(Rotated, LSQ):
    """QuaRot's rotations (Ashkboos et al. 2024), fixed, then LSQ (Esser et al. 2020) on the rotated weights and inputs."""
