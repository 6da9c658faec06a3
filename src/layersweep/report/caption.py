"""What stands above every table and figure, and the verdict: a figure that travels must carry its
protocol."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

TOY = "17 M toy model"
TOY_WARNING = f"these are figures of a {TOY}; they say nothing about larger models"


def model_line(results: Json) -> str:
    """Whose weights, and that deltas are of the cache alone."""
    model = results["model"]
    name = f"demo ({TOY})" if model["source"] == "demo" else model["source"]
    if model["revision"]:
        name += f"@{model['revision'][:12]}"
    router = f", router {_shout(model['router'])}" if model["router"] else ""
    weights = f"weights {_shout(model['weights'])}{router}"
    return f"{name}  {weights}: deltas are KV-only ON THESE WEIGHTS"


def verdict(results: Json) -> str:
    if results["publishable"]:
        return "publishable: the run is complete and nothing that was asked for is missing"
    return f"NOT PUBLISHABLE because: {'; '.join(results['reasons'])}"


def gate_line(results: Json) -> str:
    """What the gate looked at, for a run that measured nothing else; "" without a gate."""
    gate = results["gate"]
    if gate is None:
        return ""
    names = dict.fromkeys(check["name"] for check in gate["checks"])
    words = "passed" if gate["passed"] else "REFUSED the model"
    return f"gate {words}, {len(gate['checks'])} checks: {', '.join(names)}"


def short_dtype(dtype: str) -> str:
    return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)


def _shout(word: str) -> str:
    return word.upper() if word in ("nf4", "fp4") else word
