"""Quantization: a scheme (bits, granularity, scope), a method with its options (ptq, qat) and a coverage report."""

from lightning_vlmq.quant import ptq, qat  # registers every method
from lightning_vlmq.quant.checkpoint import load_quantized, save_quantized
from lightning_vlmq.quant.clipping import ClippedGrid
from lightning_vlmq.quant.coverage import CoverageReport, CoverageRow, assert_covered, measure_coverage
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantConv2d, QuantizedLayer, QuantLinear, quantized_layers, swap_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod, find_method
from lightning_vlmq.quant.quantized import Quantization, Quantized, quantize
from lightning_vlmq.quant.scheme import LayerRule, QuantScheme
from lightning_vlmq.quant.training import QATMethod

__all__ = [
    "METHODS",
    "ClippedGrid",
    "CoverageReport",
    "CoverageRow",
    "FakeQuantizer",
    "LayerRule",
    "PTQMethod",
    "QATMethod",
    "QuantConv2d",
    "QuantLinear",
    "QuantScheme",
    "Quantization",
    "Quantized",
    "QuantizedLayer",
    "assert_covered",
    "find_method",
    "load_quantized",
    "measure_coverage",
    "ptq",
    "qat",
    "quantize",
    "quantized_layers",
    "save_quantized",
    "swap_layers",
]
