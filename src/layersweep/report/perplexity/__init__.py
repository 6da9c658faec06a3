"""The perplexity section of a report."""
