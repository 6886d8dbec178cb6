"""Arguments that make the embedded data small enough for a test: 24 concepts, two drawings of each in distribution."""

SMALL_DATA = {
    "n_concepts": 24,
    "n_shifted": 16,
    "n_ood": 21,
    "corruptions": ["gaussian_noise"],
    "severities": [1, 5],
    "renditions": ["inverted"],
    "calibration_pairs": 240,
    "train_batch_size": 60,
}
