"""How the run was made: command, model, gate, paths, fallbacks, performance, versions."""

from __future__ import annotations

from html import escape
from typing import Any

from layersweep.report.parts import facts, how, scroll, section, table
from layersweep.units import format_bytes, format_seconds

Json = dict[str, Any]

SIZES = (
    ("peak_device_bytes", "peak device memory"),
    ("planned_device_bytes", "planned device memory"),
    ("peak_host_bytes", "peak host memory"),
    ("vram_budget", "device budget"),
    ("ram_budget", "host budget"),
    ("weight_bytes_read", "weights read"),
    ("h2d_bytes", "copied to the device"),
)
HASH_LENGTH = 64  # sha256; results.json has all of it
RATES = (
    ("achieved_tflops", "achieved, TFLOP/s"),
    ("gemm_ceiling_tflops", "GEMM ceiling, TFLOP/s"),
    ("mfu", "share of the ceiling"),
    ("h2d_gbps", "host to device, GB/s"),
    ("compute_stall_fraction", "compute stalled, share"),
)


def run_facts(results: Json) -> str:
    """The sections a reader needs to repeat or to doubt the run."""
    blocks = (
        ("Model", _model(results["model"])),
        ("Protocol", _flat(results["protocol"])),
        ("Performance", _performance(results["performance"])),
        ("Paths", _flat(results["paths"]) + _flat(results["device"])),
        ("Versions", _flat(results["versions"])),
    )
    columns = "".join(
        f"<div><h3>{name}</h3>{facts([(k, v) for k, v in pairs if v])}</div>"
        for name, pairs in blocks
    )
    return section(
        "How it was run",
        f"<pre>{escape(results['command'])}</pre>{_gate(results['gate'])}"
        f'{_fallbacks(results["fallbacks"])}<div class="pairs-of">{columns}</div>',
    )


def _gate(gate: Json | None) -> str:
    if gate is None:
        return how("The gate was turned off: nothing checked that the model works.")
    lines = [
        [
            check["name"] if check["layer"] is None else f"{check['name']}, layer {check['layer']}",
            _value(check["value"]),
            _value(check["limit"]),
            "passed" if check["passed"] else "FAILED",
        ]
        for check in gate["checks"]
    ]
    used = gate["experts_used_per_layer"]
    experts = f" Experts used per layer: {', '.join(map(str, used))}." if used else ""
    words = "passed" if gate["passed"] else "REFUSED the model"
    grid = scroll(table(["check", "value", "limit", "result"], lines)) if lines else ""
    return (
        f"<h3>Gate</h3>{how(f'The gate {words}.{experts}')}"
        f"<details><summary>{len(lines)} checks</summary>{grid}</details>"
    )


def _fallbacks(fallbacks: list[Json]) -> str:
    if not fallbacks:
        return how("No fallback was taken.")
    lines = [[f["what"], f["wanted"], f["used"], f["why"]] for f in fallbacks]
    grid = table(["what", "wanted", "used", "why"], lines, words=True)
    return f"<h3>Fallbacks</h3>{scroll(grid)}"


def _model(model: Json) -> list[tuple[str, str]]:
    shown = _flat({key: value for key, value in model.items() if key != "bytes"})
    return [*shown, ("size", format_bytes(model["bytes"]))]


def _performance(performance: Json) -> list[tuple[str, str]]:
    sweeps = f"{performance['sweeps']} (and {performance['gate_sweeps']} for the gate)"
    pairs = [
        ("wall time", format_seconds(performance["wall_s"])),
        ("weight sweeps", sweeps),
        ("tokens", f"{performance['tokens']:,}"),
    ]
    pairs += [
        (f"phase {name}", format_seconds(seconds))
        for name, seconds in performance["phases"].items()
        if seconds is not None
    ]
    pairs += [(words, format_bytes(performance[key])) for key, words in SIZES if performance[key]]
    pairs += [
        (words, f"{performance[key]:.3g}") for key, words in RATES if performance[key] is not None
    ]
    if performance["planned_s"] is not None:
        pairs.append(("planned time", format_seconds(performance["planned_s"])))
    return pairs


def _flat(mapping: Json) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            pairs += [(f"{key} {name}", words) for name, words in _flat(value)]
        else:
            pairs.append((key.replace("_", " "), _value(value)))
    return pairs


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    words = str(value)
    is_hash = len(words) == HASH_LENGTH and set(words) <= set("0123456789abcdef")
    return f"{words[:16]}\u2026" if is_hash else words
