"""Arguments that make the embedded data small enough for a test."""

SMALL_DATA = {
    "per_class": 6,
    "per_class_shifted": 2,
    "n_far_ood": 21,
    "corruptions": ["gaussian_noise"],
    "severities": [1, 5],
    "renditions": ["inverted"],
    "train_batch_size": 250,
}
