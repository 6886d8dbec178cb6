"""The identity of a run, and the store that keeps what it found."""

from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore

__all__ = ["ResultsStore", "RunKey"]
