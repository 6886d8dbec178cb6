"""What validation records with: torchmetrics classes, whose states add up over batches and processes.

Every metric is a function of :mod:`~lightning_vlmq.metrics.functional`, of what these have gathered.
"""
