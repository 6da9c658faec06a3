"""Generation: where weights and caches go, and the walks over the weights, one per token."""
