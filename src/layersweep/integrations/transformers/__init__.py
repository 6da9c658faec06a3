"""layersweep in transformers: its caches for their models, and its models for their `generate`."""

from layersweep.integrations.transformers.cache import cache_for, cache_size
from layersweep.integrations.transformers.causal_lm import SweptForCausalLM, as_transformers

__all__ = ["SweptForCausalLM", "as_transformers", "cache_for", "cache_size"]
