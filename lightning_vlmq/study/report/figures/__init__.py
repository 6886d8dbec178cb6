"""The report's figures: each a function of the analysis that returns a matplotlib figure, or ``None`` without data."""
