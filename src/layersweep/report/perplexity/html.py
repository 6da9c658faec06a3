"""The perplexity section of the page and of a notebook's cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layersweep.report import text
from layersweep.report.caption import model_line
from layersweep.report.parts import figure, how, scroll, section, table
from layersweep.report.perplexity import figures, rows

Json = dict[str, Any]

CARDS = 6


def page(results: Json, asides: Mapping[str, Sequence[str]]) -> str:
    """Cards, the table and its figures, and every window."""
    parts = [
        how(
            "Every arm scores the same tokens as the exact cache, so only the difference counts. "
            "A positive difference means the quantized cache predicts worse. The perplexity itself "
            "depends on this protocol and is not comparable with other tools' protocols."
        ),
        figure(_lines(results), "Results per arm", scroll(arm_table(results))),
        uncertainty(results),
        figure(
            _lines(results),
            "Difference to the exact cache",
            scroll(figures.forest(results) or ""),
            "A bar that does not reach the zero line is a difference beyond chance; inside the "
            "shaded noise band (twice the identity control) nothing can be told apart. "
            "Hollow marks are simulated codecs.",
        ),
        figure(
            _lines(results),
            "Loss against measured bits",
            scroll(figures.loss_against_bits(results) or ""),
            "Lower left is better: fewer bits, less loss. Bits are measured bytes, scales and "
            "exact parts included; arms whose bits nobody counted are left out.",
        ),
        _pairs(results),
        _controls(results),
    ]
    perplexity = section("Perplexity", "".join(parts))
    return cards(results, asides) + perplexity + _windows(results)


def cards(results: Json, asides: Mapping[str, Sequence[str]]) -> str:
    """The answer first: each arm's delta, interval and bits, and what other sections
    say of it."""
    arms = [arm for arm in results["perplexity"]["arms"] if arm["status"] == "ok"]
    if not arms or len(arms) > CARDS:
        return ""
    colour = figures.method_colours(results)
    printed = {row.arm: row for row in rows.arm_rows(results)}
    cards = []
    for arm in arms:
        row, hollow = printed[arm["arm"]], " hollow" if arm["simulated"] else ""
        others = "".join(f"<br>{escape(words)}" for words in asides.get(row.arm, ()))
        cards.append(
            f'<div class="card c{colour[arm["method"]]}"><div class="arm{hollow}">'
            f'{escape(row.label)}</div><div class="big">{_minus(row.delta)} %</div>'
            f'<div class="small">perplexity, 95 % CI<br>{_minus(row.interval)}<br>'
            f"{row.bits} bits, {row.size} smaller{others}</div></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def arm_table(results: Json) -> str:
    """One row per arm, the table of the terminal."""
    head = ["arm", "bits", "size", rows.PER_TOKEN, "ppl", "delta %", "95 % CI", "SEM", "z"]
    head += ["worse", "KL mean/p99.9", "top-1 %"]
    body = [
        [
            *(r.label, r.bits, r.size, r.per_token, r.ppl, r.delta, r.interval, r.sem, r.z),
            *(r.worse, r.kl, r.top1),
        ]
        for r in rows.arm_rows(results)
    ]
    return table(head, [[_minus(cell) for cell in line] for line in body])


def pair_table(results: Json, *, every: bool) -> str:
    """Codec against codec: all pairs, or the few that the terminal has; empty without pairs."""
    pairs = rows.pair_rows(results, every=every)
    if not pairs:
        return ""
    head = ["pair", "difference %", "95 % CI", "Holm p", "z", "loss ratio, 95 % CI"]
    body = [
        [f"{p.a} - {p.b}", _minus(p.delta), _minus(p.interval), p.p]
        + [cell.replace("-", "\u2212") for cell in (p.z, p.ratio)]
        for p in pairs
    ]
    return table(head, body)


def uncertainty(results: Json) -> str:
    """Where intervals come from, and what is too small to be seen."""
    return how(f"{rows.uncertainty_line(results)}.".replace(" %", "\u00a0%"))


def _pairs(results: Json) -> str:
    pairs = pair_table(results, every=True)
    if not pairs:
        return ""
    return figure(
        _lines(results),
        "Codec against codec",
        scroll(pairs),
        "First arm minus second on the same windows: negative means that the first loses less. "
        "z is the difference over its SEM. The loss ratio is the first arm's loss against exact "
        "over the second's; a dash where the second's is not clearly positive.",
    )


def _controls(results: Json) -> str:
    named = rows.controls(results["perplexity"])
    detail = [
        [arm["arm"], text.fixed(_times(arm["sem_iid"], 100), 4)]
        + [text.p_value(arm[key], "p") for key in ("p_flip", "p_holm")]
        + [text.fixed(arm["mde_percent"], 3), text.fixed(arm["percent_mean_of_windows"], 4)]
        for arm in results["perplexity"]["arms"]
    ]
    head = ["arm", "iid SEM %", "sign flips", "Holm", "MDE %", "mean of window %"]
    tests = scroll(table(head, detail))
    controls = [
        [name, str(n["n"])]
        + [text.significant(_times(n[key], 100)) for key in ("rms", "mean", "max")]
        + [text.significant(n["kl"])]
        for name, n in named
    ]
    names = ["control", "windows", "rms %", "mean %", "largest %", "KL"]
    noise = table(names, controls) if named else ""
    lag = text.fixed(results["perplexity"]["lag1"], 2)
    return (
        f"<details><summary>Tests and controls</summary>{tests}"
        f"<p class='how'>Sign flips change whole {rows.grouping(results)}, because neighbours "
        f"correlate; Holm adjusts for the number of arms. Largest lag-1 autocorrelation of the "
        f"differences: {_minus(lag)}. The "
        "exact control repeats the uncompressed cache; the identity control runs a codec's "
        f"transforms without quantizing.</p>{scroll(noise)}</details>"
    )


def _windows(results: Json) -> str:
    drawn = [
        f"<h3>{escape(arm['arm'])}</h3>{scroll(picture)}"
        for arm in results["perplexity"]["arms"]
        if (picture := figures.windows(results, arm))
    ]
    return section(
        "Window by window",
        figure(
            _lines(results),
            "Difference per window, 100 x nats (about percent)",
            "".join(drawn),
            "One dot per window in text order, the mean dashed. Grey bands separate articles: "
            "neighbours resemble each other, which is why the SEM is taken over "
            f"{rows.grouping(results)}.",
        ),
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _minus(words: str) -> str:
    """A real minus sign before digits; hyphens inside names stay."""
    return words.replace("-", "\u2212") if words[:2].strip("[")[:1] in ("-", "+", "") else words


def _lines(results: Json) -> list[str]:
    return [model_line(results), rows.protocol_line(results)]
