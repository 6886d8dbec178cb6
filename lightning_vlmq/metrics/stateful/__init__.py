"""Metrics that stream over batches and processes: torchmetrics classes over the functions of :mod:`~lightning_vlmq.metrics.functional`.

Validation records with :class:`~.records.SampleRecords` and :class:`~.classwise.ClasswiseGaps`; the others are for loops of your own, and
give the values that validation files.
"""
