"""The needle section in words and formatted cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layersweep.report import text
from layersweep.report.caption import short_dtype

Json = dict[str, Any]


@dataclass(frozen=True)
class NeedleRow:
    """One arm's needles: `count` holds k/n and its interval, `against` the comparison to exact."""

    arm: str
    count: str
    against: str


def protocol_line(results: Json) -> str:
    section, protocol = results["needle"], results["protocol"]
    how = (
        "found: every answer token is the argmax"
        if section["mode"] == "teacher"
        else "found: the first number of a greedy answer"
    )
    return (
        f"haystack from {protocol['text_source']}, "
        f"context {'+'.join(map(str, section['contexts']))}, {len(section['trials'])} needles, "
        f"question and answer read the quantized cache | {how}, {short_dtype(protocol['dtype'])}"
    )


def title(results: Json) -> str:
    """What was tried: "needle 4096, 60" or, below 60, "needle 4096, spot check of 20"."""
    section = results["needle"]
    contexts = "+".join(str(context) for context in section["contexts"])
    trials = len(section["trials"])
    size = f"spot check of {trials}" if section["spot_check"] else f"{trials}"
    keys = f", {section['keys']} keys" if section["keys"] > 1 else ""
    return f"needle {contexts}, {size}{keys} ({section['mode']})"


def needle_rows(results: Json) -> list[NeedleRow]:
    return [
        NeedleRow(
            arm=arm["arm"],
            count=text.count_of(arm["correct"], arm["n"], arm["wilson95"]),
            against=_against(arm),
        )
        for arm in results["needle"]["arms"]
    ]


def failure(results: Json) -> str | None:
    """The sentence for a baseline that fails, or None."""
    section = results["needle"]
    if section["baseline_gate"] == "passed":
        return None
    exact = section["arms"][0]
    count = text.count_of(exact["correct"], exact["n"], exact["wilson95"])
    return f"needle baseline FAILED: exact finds {count}, 80 % are needed; arms are not meaningful"


def context_counts(arm: Json) -> list[tuple[int, str]]:
    """k/n with its interval for each context length."""
    return [
        (cell["context"], text.count_of(cell["correct"], cell["n"], cell["wilson95"]))
        for cell in arm["by_context"]
    ]


def _against(arm: Json) -> str:
    if arm["lost"] is None:
        return ""
    words = f"lost {arm['lost']} gained {arm['gained']}, {text.p_value(arm['p_flip'], 'p')}"
    if arm["answer_nll_delta"] is None:
        return words
    delta = arm["answer_nll_delta"]
    sign = "+" if delta >= 0 else ""
    spread = "" if arm["answer_nll_sem"] is None else f" +-{text.two_digits(arm['answer_nll_sem'])}"
    return f"{words}, answer NLL {sign}{text.two_digits(delta)}{spread}"
