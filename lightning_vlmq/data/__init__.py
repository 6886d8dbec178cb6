"""Data modules: evaluation sets tagged with roles, prompts, and caption pairs."""

from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.data.embedded import EmbeddedData, EmbeddedPretraining
from lightning_vlmq.data.filedata import FileData
from lightning_vlmq.data.sets import EvalSet, ImageSet, TensorImages

__all__ = [
    "EmbeddedData",
    "EmbeddedPretraining",
    "EvalSet",
    "FileData",
    "ImageSet",
    "ReliabilityDataModule",
    "TensorImages",
]
