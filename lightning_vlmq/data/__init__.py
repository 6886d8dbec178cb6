"""Data modules: evaluation sets tagged with roles, prompts, and caption pairs."""

from lightning_vlmq.data.datamodule import EvalSet, ImageSet, ReliabilityDataModule, TensorImages
from lightning_vlmq.data.embedded import EmbeddedData, EmbeddedPretraining
from lightning_vlmq.data.files import FileData

__all__ = [
    "EmbeddedData",
    "EmbeddedPretraining",
    "EvalSet",
    "FileData",
    "ImageSet",
    "ReliabilityDataModule",
    "TensorImages",
]
