"""The needle section of a report."""
