"""layersweep: run and evaluate language models whose weights do not fit the GPU."""

__version__ = "0.1.0"
