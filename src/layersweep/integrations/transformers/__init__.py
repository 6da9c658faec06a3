"""layersweep in transformers: its caches for their models, and its models for their `generate`."""

from layersweep.integrations.transformers.cache import cache_for, cache_size

__all__ = ["cache_for", "cache_size"]
