"""Every corruption is as strong as an independent implementation's, at every severity, on small and large images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from cases.corruptions import DRAWS, IMAGES, VARIED, changes, smooth_pixels

from lightning_vlmq.data.corruptions import CORRUPTIONS, corrupt

with Path(__file__).with_name("strengths.csv").open(encoding="utf-8") as file:
    FROZEN = list(csv.DictReader(file))


def test_every_family_severity_and_size_is_frozen():
    keys = {(row["corruption"], int(row["severity"]), int(row["side"])) for row in FROZEN}
    assert keys == {(name, severity, side) for name in CORRUPTIONS for severity in range(1, 6) for side in IMAGES}
    assert len(FROZEN) == 19 * 5 * 2


@pytest.mark.parametrize("side", IMAGES)
@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_as_strong_as_an_independent_implementation(name, side):
    draws = 8 if name in VARIED else 1
    pixels = np.tile(smooth_pixels(IMAGES[side], side, side, seed=side), (draws, 1, 1, 1))
    for row in (row for row in FROZEN if row["corruption"] == name and int(row["side"]) == side):
        severity = int(row["severity"])
        corrupted = corrupt(torch.from_numpy(pixels), name, severity, torch.arange(len(pixels)) + 1000 * severity)
        for quantity, own in zip(("shift", "strength", "share"), changes(pixels, corrupted.numpy()).mean(0)):
            frozen, noise = float(row[quantity]), float(row[f"{quantity}_noise"])
            allowed = 4.5 * noise * np.sqrt((1 + 1 / DRAWS) / len(pixels)) + (0.01 if quantity == "share" else 0.3)
            if name == "glass_blur" and quantity == "shift":
                allowed += 0.5  # published levels are cut before the shuffle, here they are rounded
            if name == "frost":
                allowed += 0.2 * abs(frozen)  # the ice is drawn here, and photographed there
            assert abs(own - frozen) <= allowed, (severity, quantity, own, frozen, allowed)
