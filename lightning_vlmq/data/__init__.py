"""Data modules: evaluation sets tagged with roles, prompts, and caption pairs."""

from lightning_vlmq.data.datamodule import EvalSet, ReliabilityDataModule, TensorImages
from lightning_vlmq.data.embedded import EmbeddedData, EmbeddedPretraining

__all__ = ["EmbeddedData", "EmbeddedPretraining", "EvalSet", "ReliabilityDataModule", "TensorImages"]
