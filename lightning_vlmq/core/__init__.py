"""What everything builds on: errors, registries, atomic files."""
