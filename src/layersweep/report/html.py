"""report.html: one file, no request to anywhere, light and dark, that a person can show."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from layersweep.report import figures, rows, text
from layersweep.report.facts import run_facts
from layersweep.report.parts import figure, how, scroll, section, table
from layersweep.runs.files import write_atomically

Json = dict[str, Any]

REPORT_FILE = "report.html"
CARDS = 6
SHOWN_FAILURES = 40


def write_html(directory: Path, results: Json) -> Path:
    """Writes DIRECTORY/report.html, whole or not at all."""
    path = directory / REPORT_FILE
    write_atomically(path, html_page(results))
    return path


def html_page(results: Json) -> str:
    """The whole page as text."""
    css = resources.files("layersweep.report").joinpath("page.css").read_text("utf-8")
    title = f"KV cache report: {rows.caption(results).model.partition('  ')[0]}"
    body = [_head(results)]
    if results["perplexity"] is not None:
        body += [_cards(results), _perplexity(results), _windows(results)]
    if results["needle"] is not None:
        body.append(_needle(results))
    body += [run_facts(results), _foot(results)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def _head(results: Json) -> str:
    model, _, weights = rows.caption(results).model.partition("  ")
    return (
        '<p class="kicker">layersweep report</p>'
        f'<h1>What a quantized KV cache costs<br><span class="whose">{escape(model)}</span></h1>'
        f'<p class="lead">{escape(weights[:1].upper() + weights[1:])}.</p>'
        f"{verdict(results)}{notes(results)}"
    )


def notes(results: Json) -> str:
    """What must be known before a number is used; empty where there is nothing."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in rows.warnings(results))
    return f'<div class="notice"><strong>Note</strong><ul>{lines}</ul></div>' if lines else ""


def verdict(results: Json) -> str:
    """Whether the numbers may leave the house, and what is missing."""
    if results["publishable"]:
        line = rows.verdict(results)
        return f'<div class="notice good"><strong>Publishable</strong>{escape(line[11:])}</div>'
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in results["reasons"])
    return (
        f'<div class="notice bad"><strong>NOT PUBLISHABLE</strong> because<ul>{reasons}</ul></div>'
    )


def _cards(results: Json) -> str:
    """The answer first: each arm's delta, interval, bits and needles."""
    arms = [arm for arm in results["perplexity"]["arms"] if arm["status"] == "ok"]
    if not arms or len(arms) > CARDS:
        return ""
    colour = figures.method_colours(results)
    printed = {row.arm: row for row in rows.perplexity_rows(results)}
    needles = {} if results["needle"] is None else {r.arm: r for r in rows.needle_rows(results)}
    cards = []
    for arm in arms:
        row, hollow = printed[arm["arm"]], " hollow" if arm["simulated"] else ""
        found = f"<br>needles {escape(needles[row.arm].count)}" if row.arm in needles else ""
        cards.append(
            f'<div class="card c{colour[arm["method"]]}"><div class="arm{hollow}">'
            f'{escape(row.label)}</div><div class="big">{_minus(row.delta)} %</div>'
            f'<div class="small">perplexity, 95 % CI<br>{_minus(row.interval)}<br>'
            f"{row.bits} bits, {row.size} smaller{found}</div></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _perplexity(results: Json) -> str:
    parts = [
        how(
            "Every arm scores the same tokens as the exact cache, so only the difference counts. "
            "A positive difference means the quantized cache predicts worse. The perplexity itself "
            "depends on this protocol and is not comparable with other tools' protocols."
        ),
        figure(results, "Results per arm", scroll(arm_table(results))),
        uncertainty(results),
        figure(
            results,
            "Difference to the exact cache",
            scroll(figures.forest(results) or ""),
            "A bar that does not reach the zero line is a difference beyond chance; inside the "
            "shaded noise band (twice the identity control) nothing can be told apart. "
            "Hollow marks are simulated codecs.",
        ),
        figure(
            results,
            "Loss against measured bits",
            scroll(figures.loss_against_bits(results) or ""),
            "Lower left is better: fewer bits, less loss. Bits are measured bytes, scales and "
            "exact parts included; arms whose bits nobody counted are left out.",
        ),
        _pairs(results),
        _controls(results),
    ]
    return section("Perplexity", "".join(parts))


def uncertainty(results: Json) -> str:
    """Where intervals come from, and what is too small to be seen."""
    return how(f"{rows.uncertainty_line(results)}.".replace(" %", "\u00a0%"))


def arm_table(results: Json) -> str:
    """One row per arm, the table of the terminal."""
    head = ["arm", "bits", "size", "ppl", "delta %", "95 % CI", "SEM", "z", "worse"]
    head += ["KL mean/p99.9", "top-1 %"]
    body = [
        [r.label, r.bits, r.size, r.ppl, r.delta, r.interval, r.sem, r.z, r.worse, r.kl, r.top1]
        for r in rows.perplexity_rows(results)
    ]
    return table(head, [[_minus(cell) for cell in line] for line in body])


def pair_table(results: Json, *, every: bool) -> str:
    """Codec against codec: all pairs, or the few that the terminal has; empty without pairs."""
    pairs = rows.pair_rows(results, every=every)
    if not pairs:
        return ""
    head = ["pair", "difference %", "95 % CI", "Wilcoxon, Holm", "z", "loss ratio, 95 % CI"]
    body = [
        [f"{p.a} - {p.b}", _minus(p.delta), _minus(p.interval), p.p]
        + [cell.replace("-", "\u2212") for cell in (p.z, p.ratio)]
        for p in pairs
    ]
    return table(head, body)


def _pairs(results: Json) -> str:
    pairs = pair_table(results, every=True)
    if not pairs:
        return ""
    return figure(
        results,
        "Codec against codec",
        scroll(pairs),
        "First arm minus second on the same windows: negative means that the first loses less. "
        "z is the difference over its SEM. The loss ratio is the first arm's loss against exact "
        "over the second's; a dash where the second's is not clearly positive.",
    )


def _controls(results: Json) -> str:
    floor = results["perplexity"]["noise_floor"]
    named = [("exact again", floor["exact"])] if floor["exact"] else []
    if floor["identity"]:
        named += [(f"identity, {m}", n) for m, n in floor["identity"]["by_method"].items()]
    detail = [
        [arm["arm"], text.fixed(_times(arm["sem_iid"], 100), 4)]
        + [text.p_value(arm[key], "p") for key in ("p_sign", "p_wilcoxon", "p_holm")]
        + [text.fixed(arm["mde_percent"], 3), text.fixed(arm["percent_mean_of_windows"], 4)]
        for arm in results["perplexity"]["arms"]
    ]
    head = ["arm", "iid SEM %", "sign", "Wilcoxon", "Holm", "MDE %", "mean of window %"]
    tests = scroll(table(head, detail))
    controls = [
        [name, str(n["n"]), f"{100 * n['mean']:.2g}", f"{100 * n['max']:.2g}", f"{n['kl']:.2g}"]
        for name, n in named
    ]
    noise = table(["control", "windows", "mean %", "largest %", "KL"], controls) if named else ""
    lag = text.fixed(results["perplexity"]["lag1"], 2)
    return (
        f"<details><summary>Tests and controls</summary>{tests}"
        f"<p class='how'>Largest lag-1 autocorrelation of the differences: {_minus(lag)}. The "
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
            results,
            "Difference per window, 100 x nats (about percent)",
            "".join(drawn),
            "One dot per window in text order, the mean dashed. Grey bands separate articles: "
            "neighbours resemble each other, which is why the SEM is taken over "
            f"{rows.grouping(results)}.",
        ),
    )


def needle_table(results: Json) -> str:
    """One row per arm: needles found, and against the exact cache."""
    body = [
        [row.arm, row.count, row.against.replace("+-", "\u00b1 ")]
        for row in rows.needle_rows(results)
    ]
    return table(["arm", "found", "against exact"], body, words=True)


def needle_notice(results: Json) -> str:
    """The baseline's failure, which makes the arms' needles say nothing; empty where it passed."""
    failure = rows.needle_failure(results)
    return f'<div class="notice bad"><strong>{escape(failure)}</strong></div>' if failure else ""


def _needle(results: Json) -> str:
    title = rows.needle_title(results)
    parts = [
        how(
            "A sentence with a number is hidden in the text and asked for at the end. The exact "
            "cache shows what the model can do at all; lost and gained count needles on which an "
            "arm differs from it."
        ),
        needle_notice(results),
        figure(
            results,
            title[:1].upper() + title[1:],
            scroll(needle_table(results)),
            needle=True,
        ),
        figure(
            results,
            "Needles found by depth",
            scroll(figures.heatmap(results)),
            "Depth runs from the start of the context to its end. A cell holds few trials: read "
            "the totals with their 95 % intervals, use the cells to see where misses gather.",
            needle=True,
        ),
        _failures(results),
    ]
    return section("Needle in a haystack", "".join(parts))


def _failures(results: Json) -> str:
    """What was answered where any arm was wrong; model output is escaped, it can be anything."""
    trials = [t for t in results["needle"]["trials"] if not all(t["correct"].values())]
    if not trials:
        return "<p class='how'>No arm missed a needle.</p>"
    lines = [
        [
            f"{trial['context']} at {100 * trial['achieved_depth']:.1f} %",
            trial["key"],
            trial["answer"],
            arm,
            trial["outputs"].get(arm, ""),
        ]
        for trial in trials[:SHOWN_FAILURES]
        for arm, right in trial["correct"].items()
        if not right
    ]
    shown = min(len(trials), SHOWN_FAILURES)
    grid = scroll(table(["needle", "key", "hidden", "arm", "answered"], lines, words=True))
    return (
        f"<details><summary>Failed needles ({shown} of {len(trials)} shown)</summary>"
        f"{grid}</details>"
    )


def _foot(results: Json) -> str:
    return (
        f"<footer>layersweep {escape(str(results['versions']['layersweep']))}, "
        f"{escape(results['created'])}. Intervals are 95 %: BCa bootstrap for perplexity, "
        "percentile bootstrap for loss ratios, Wilson for needles. Every number on this page is in "
        "results.json.</footer>"
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _minus(words: str) -> str:
    """A real minus sign before digits; hyphens inside names stay."""
    return words.replace("-", "\u2212") if words[:2].strip("[")[:1] in ("-", "+", "") else words
