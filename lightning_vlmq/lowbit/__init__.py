"""Real low-bit models: integer layers, conversion, packing, export."""
