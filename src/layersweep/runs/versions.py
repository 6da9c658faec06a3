"""Which results.json this version writes, and which it reads."""

SCHEMA = "layersweep.results/2"
EARLIER = "layersweep.results/1"
METRICS_VERSION = 3
"""Changes where a number with the same name would come out differently."""
