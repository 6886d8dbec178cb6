"""What watches a run, and what files its results."""

from lightning_vlmq.callbacks.activations import ActivationSpectrum
from lightning_vlmq.callbacks.bands import BandAccuracies
from lightning_vlmq.callbacks.grids import GridTrajectories
from lightning_vlmq.callbacks.models import QuantizedModelWriter
from lightning_vlmq.callbacks.predictions import PredictionWriter
from lightning_vlmq.callbacks.printing import CoveragePrinter, HeadlinePrinter
from lightning_vlmq.callbacks.reliability import ReliabilityDiagrams
from lightning_vlmq.callbacks.results import ResultsWriter
from lightning_vlmq.callbacks.spectrum import SingularValueSpectrum
from lightning_vlmq.callbacks.summary import RunSummary
from lightning_vlmq.callbacks.surgery import ErrorSurgery
from lightning_vlmq.callbacks.zoo import ZooExport

__all__ = [
    "ActivationSpectrum",
    "BandAccuracies",
    "CoveragePrinter",
    "ErrorSurgery",
    "GridTrajectories",
    "HeadlinePrinter",
    "PredictionWriter",
    "QuantizedModelWriter",
    "ReliabilityDiagrams",
    "ResultsWriter",
    "RunSummary",
    "SingularValueSpectrum",
    "ZooExport",
]
