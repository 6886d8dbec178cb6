"""The search of rates: who sees which pairs, and which rates are chosen."""

import importlib.util
import sys
from pathlib import Path

import torch

from lightning_vlmq.data.sets import TensorImages

SCRIPT = Path(__file__).parents[2] / "scripts" / "search_rates.py"
spec = importlib.util.spec_from_file_location("search_rates", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules["search_rates"] = script  # dataclasses look their module up
spec.loader.exec_module(script)


def test_every_pair_is_in_one_part_and_keeps_its_caption():
    parts = {part: script.rows_of(part, 57) for part in ("fit", "select", "report")}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(57))
    assert min(len(rows) for rows in parts.values()) >= 5
    pairs = TensorImages(
        torch.arange(57, dtype=torch.uint8).view(-1, 1, 1, 1), caption=[f"pair {k}" for k in range(57)]
    )
    chosen = script.of_rows(pairs, parts["select"])
    assert chosen.columns["caption"] == [f"pair {int(image)}" for image in chosen.images.flatten()]


def test_a_fit_gets_neither_the_pairs_that_select_nor_those_that_report():
    data = script.data_for(40)
    kept, apart = data.pairs.images, torch.cat([part.images for part in data.parts.values()])
    assert len(kept) == 32 and len(apart) == 8
    assert not any(torch.equal(one, other) for one in kept for other in apart)
    assert len(data.calibration_batches()[0]["image"]) == 32


def test_the_least_geometric_mean_is_chosen_and_of_equal_ones_the_lowest_rates():
    assert script.chosen_rates({(1.0, 1.0): [0.5, 0.5], (2.0, 1.0): [0.1, 2.0], (3.0, 1.0): [0.9, 0.2]}) == (3.0, 1.0)
    assert script.chosen_rates({(2.0, 1.0): [0.5], (1.0, 3.0): [0.5], (1.0, 2.0): [0.5]}) == (1.0, 2.0)
