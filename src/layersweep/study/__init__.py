"""A study: its settings, its plan, its run."""
