"""Paired perplexity."""
