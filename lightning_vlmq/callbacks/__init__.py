"""What watches a run, and what files its results."""

from lightning_vlmq.callbacks.quantized import QuantizedModelWriter
from lightning_vlmq.callbacks.reliability import ReliabilityDiagrams
from lightning_vlmq.callbacks.results import CoveragePrinter, PredictionWriter, ResultsWriter, ZooExport
from lightning_vlmq.callbacks.spectrum import SingularValueSpectrum

__all__ = [
    "CoveragePrinter",
    "PredictionWriter",
    "QuantizedModelWriter",
    "ReliabilityDiagrams",
    "ResultsWriter",
    "SingularValueSpectrum",
    "ZooExport",
]
