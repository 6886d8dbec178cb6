"""The study: a grid of runs over Hydra, and the report on what they stored."""
