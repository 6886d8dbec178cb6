"""LightningModules: evaluation, and training of the zoo and of quantized models."""

from lightning_vlmq.modules.evaluation import EvaluationModule
from lightning_vlmq.modules.pretraining import PretrainingModule
from lightning_vlmq.modules.qat import QATModule
from lightning_vlmq.quant import Quantization

__all__ = ["EvaluationModule", "PretrainingModule", "QATModule", "Quantization"]
