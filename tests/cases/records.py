"""Made-up confidences and whether they came true."""

import torch


def random_records(*shape, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(*shape, generator=generator)
    if levels:
        confidence = (confidence * levels).round() / levels  # ties, and exact 0, 1 and bin edges
    return confidence, torch.rand(*shape, generator=generator) < confidence
