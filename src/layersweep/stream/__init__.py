"""Weights in time: which bytes belong together, where they wait, and when they arrive."""
