"""Measurements on this machine: what layersweep does, and what people use today beside it."""
