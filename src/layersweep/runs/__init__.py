"""Runs as files: records, finished sweeps, shards, merging. No torch, no model."""
