"""How wide a report is where no terminal says so."""

FULL_WIDTH = 100  # narrower terminals get fewer columns rather than cut numbers
