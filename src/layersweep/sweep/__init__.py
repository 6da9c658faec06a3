"""The one loop: every layer is visited once, and all sequences ride on the visit."""
