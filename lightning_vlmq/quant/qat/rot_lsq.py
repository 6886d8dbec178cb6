"""Rotation, then LSQ ("Rot+LSQ")."""

from __future__ import annotations

from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.ptq.quarot import Rotated
from lightning_vlmq.quant.qat.lsq import CLIP_KD_FEATURE_WEIGHT, LSQContrastive


@METHODS.register("rot_lsq_contrastive")
class RotLSQContrastive(Rotated, LSQContrastive):
    """QuaRot's rotations (Ashkboos et al. 2024), fixed, then LSQ (Esser et al. 2020) on the rotated weights and inputs."""


@METHODS.register("rot_lsq_feature")
class RotLSQFeature(RotLSQContrastive):
    """QuaRot's rotations, then LSQ with contrastive distillation and the feature loss of CLIP-KD."""

    feature_weight = CLIP_KD_FEATURE_WEIGHT
