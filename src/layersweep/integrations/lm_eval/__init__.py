"""lm-evaluation-harness on swept models, under any number of KV-cache arms.

    layersweep lm-eval MODEL --tasks arc_easy,hellaswag --kv K3V2,K4V2

lm-eval has no entry points for models: it knows those that have been imported. Its own command,
with this one imported first, is a module of this package:

    python -m layersweep.integrations.lm_eval --model layersweep --model_args pretrained=DIR,kv=K3V2

and from Python importing this package is enough for simple_evaluate(model="layersweep", ...).
"""

from layersweep.integrations.lm_eval.lm import LayersweepLM, PretrainedLM

__all__ = ["LayersweepLM", "PretrainedLM"]
