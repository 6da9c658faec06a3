"""lm-eval's own command, which knows `--model layersweep` here; see this package's docstring."""

from lm_eval.__main__ import cli_evaluate

cli_evaluate()
