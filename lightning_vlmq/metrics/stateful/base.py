"""What all metrics of this room share."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric


class StreamedMetric(Metric):
    """A metric whose state adds up over batches, and which can be plotted."""

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see torchmetrics' ``Metric.plot``. Returns figure and axis."""
        return self._plot(val, ax)
