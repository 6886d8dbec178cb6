"""The embedded benchmark: its data modules, and the committed drawings that they are made of."""

from lightning_vlmq.data.embedded.benchmark import EmbeddedData
from lightning_vlmq.data.embedded.pretraining import EmbeddedPretraining

__all__ = ["EmbeddedData", "EmbeddedPretraining"]
