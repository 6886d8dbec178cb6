"""What a study found: runs side by side, comparisons, diagnostics."""
