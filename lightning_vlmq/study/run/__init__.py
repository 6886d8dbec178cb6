"""The grid of a study and its execution."""
