"""Figures that callbacks and the report share."""
