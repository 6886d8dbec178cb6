"""What watches a run, and what files its results."""

from lightning_vlmq.callbacks.printing import CoveragePrinter, HeadlinePrinter
from lightning_vlmq.callbacks.quantized import QuantizedModelWriter
from lightning_vlmq.callbacks.reliability import ReliabilityDiagrams
from lightning_vlmq.callbacks.results import PredictionWriter, ResultsWriter, ZooExport
from lightning_vlmq.callbacks.spectrum import SingularValueSpectrum

__all__ = [
    "CoveragePrinter",
    "HeadlinePrinter",
    "PredictionWriter",
    "QuantizedModelWriter",
    "ReliabilityDiagrams",
    "ResultsWriter",
    "SingularValueSpectrum",
    "ZooExport",
]
