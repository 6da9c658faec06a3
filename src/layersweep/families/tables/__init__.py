"""One file per family, or for a few that differ in a field or two. What is a Family here is known:
see docs/adding-a-model.md."""
