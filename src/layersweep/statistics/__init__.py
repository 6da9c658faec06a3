"""Statistics of paired measurements. Pure functions: numpy and scipy, no torch."""
