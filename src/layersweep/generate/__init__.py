"""Generation: placement, and walks over the weights for one more token."""
