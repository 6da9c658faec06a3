"""Tasks: what is measured on a sweep, and what is made of the numbers."""
