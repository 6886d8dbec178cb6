"""What the page of the embedded models tells, against its own definitions, on a model of random weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.data.corruptions import CORRUPTIONS
from lightning_vlmq.models import zoo

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_zoo.py"
spec = importlib.util.spec_from_file_location("measure_zoo", SCRIPT)
measure_zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure_zoo)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    vlm = zoo.build("align_clean").eval()
    data = EmbeddedData(
        datasets=("concepts", "unseen", "corruptions", "houses", "renditions", "backgrounds"),
        n_concepts=30,
        n_id=60,
        n_shifted=10,
        n_ood=20,
        corruptions=tuple(CORRUPTIONS),
        severities=(measure_zoo.SEVERITY,),
    )
    data.setup()
    data.eval_sets = [s for s in data.eval_sets if s.role != "near_ood"]
    return vlm, data, measure_zoo.measure(vlm, data)


def test_accuracies_are_those_of_the_zero_shot_classifier(measured):
    vlm, data, found = measured
    sets = {s.name: s for s in data.eval_sets}
    for name in ("concepts", "unseen", "openmoji", "backgrounds_counter"):
        s = sets[name]
        with torch.no_grad():
            classes = vlm.class_features(s.class_names or data.class_names, data.templates)
            right = (vlm.encode_image(s.images.images) @ classes.T).argmax(1) == s.images.columns["target"]
        assert found["accuracy"][name] == pytest.approx(right.double().mean().item())
    houses = data.recipe.drawings("id", 60).house
    assert sum(found["houses"][h] for h in houses) / 60 == pytest.approx(found["accuracy"]["concepts"])
    assert set(found["corruptions"]) == set(CORRUPTIONS) and found["n"] == 60


def test_largest_over_median_is_taken_of_every_vision_layers_input(measured):
    vlm, data, _ = measured
    images = data.eval_sets[0].images.images[:20]
    with torch.no_grad():
        ratios = measure_zoo.outliers(vlm, images)
        pixels = vlm.preprocess(images).abs().flatten()
    layers = [
        n for n, m in vlm.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n.startswith("model.visual")
    ]
    assert set(ratios) == set(layers) and min(ratios.values()) >= 1
    assert ratios[layers[0]] == pytest.approx((pixels.max() / pixels[pixels > 0].median()).item())


def test_the_page_has_a_line_for_every_model_house_and_family(measured):
    found = measured[2]
    text = measure_zoo.page({"align_clean": found, "vit_noisy": found})
    assert text.count("| `vit_noisy` |") == 3 and all(f"| {family} |" in text for family in CORRUPTIONS)
    n, chance = 1928, 1 / 964  # three standard errors of guessing: 0.22 points
    bands = {"0-8": 0.1, "8-64": chance + 0.0023, "64+": chance + 0.0021}
    text = measure_zoo.page(
        {"align_clean": found | {"n": n, "bands": bands}, "vit_noisy": found | {"n": n, "bands": bands | {"0-8": 0}}}
    )
    assert "(0.1) by three standard errors: 0-8 in 1, 8-64 in 2, 64+ in 0 of 2 models" in text
