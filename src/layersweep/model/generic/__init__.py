"""Any decoder of transformers, through transformers' own modules, one layer at a time."""
