"""The figures of perplexity, each a function from results to one SVG (or None: nothing to show)."""

from __future__ import annotations

from typing import Any

from layersweep.report import svg, text
from layersweep.report.perplexity import rows

Json = dict[str, Any]

COLOURS = 6
ROW = 34


def forest(results: Json) -> str | None:
    """Delta and 95 % interval per arm against the noise band."""
    arms = [arm for arm in results["perplexity"]["arms"] if arm["status"] == "ok"]
    if not arms:
        return None
    names = [svg.clip(f"{arm['arm']} (sim.)" if arm["simulated"] else arm["arm"]) for arm in arms]
    left, right, top = svg.name_width(names), 590, 16
    bottom = top + ROW * len(arms)
    noise = 2 * _identity_percent(results)
    span = [bound for arm in arms for bound in _bounds(arm)]
    low, high = svg.padded([*span, 0.0, noise, -noise])
    x = svg.Scale(low, high, left, right)
    marks = [svg.rect(x(-noise), top, x(noise) - x(-noise), bottom - top, "noise")]
    marks += _x_axis(x, top, bottom, "perplexity against exact, %")
    marks.append(svg.line(x(0), top, x(0), bottom, "zero"))
    decimals = rows.percent_decimals(results)
    colour = method_colours(results)
    for index, arm in enumerate(arms):
        y = top + ROW * (index + 0.5)
        lower, upper = _bounds(arm)
        style = _style(arm, colour)
        marks += [
            svg.text(left - 14, y + 4, names[index], "name", anchor="end"),
            svg.line(x(lower), y, x(upper), y, f"bar {style}"),
            svg.line(x(lower), y - 4, x(lower), y + 4, f"bar {style}"),
            svg.line(x(upper), y - 4, x(upper), y + 4, f"bar {style}"),
            svg.dot(x(arm["delta_percent"]), y, 5, f"mark {style}"),
            svg.text(right + 14, y + 4, _delta_words(arm, decimals), "number"),
        ]
    return svg.drawing(svg.WIDTH, bottom + 46, "Perplexity difference per arm", marks)


def loss_against_bits(results: Json) -> str | None:
    """Delta against measured bits per element; arms whose bits are unknown cannot be placed."""
    arms = [
        arm
        for arm in results["perplexity"]["arms"]
        if arm["status"] == "ok" and arm["bits_per_element"] is not None
    ]
    if not arms:
        return None
    left, right, top, bottom = 64, svg.WIDTH - 30, 16, 316
    x = svg.Scale(*svg.padded([arm["bits_per_element"] for arm in arms], share=0.2), left, right)
    low, high = svg.padded([0.0, *(bound for arm in arms for bound in _bounds(arm))])
    y = svg.Scale(low, high, bottom, top)
    marks = _x_axis(x, top, bottom, "measured bits per cached element")
    marks += _y_axis(y, left, right, "perplexity against exact, %")
    marks.append(svg.line(left, y(0), right, y(0), "zero"))
    colour = method_colours(results)
    for arm in arms:
        px, py = x(arm["bits_per_element"]), y(arm["delta_percent"])
        lower, upper = _bounds(arm)
        style = _style(arm, colour)
        # names of one method above their bars, of the next below: neighbours at like bits differ
        above = colour[arm["method"]] % 2 == 0
        name_y = y(upper) - 9 if above else y(lower) + 18
        marks += [
            svg.line(px, y(lower), px, y(upper), f"bar {style}"),
            svg.dot(px, py, 5, f"mark {style}", title=f"{arm['arm']} {_delta_words(arm, 3)}"),
            svg.text(px, name_y, arm["arm"], "name halo", anchor="middle"),
        ]
    return svg.drawing(svg.WIDTH, bottom + 46, "Perplexity difference against bits", marks)


def windows(results: Json, arm: Json) -> str | None:
    """Every window's delta of one arm, with its mean; articles alternate in the background.

    All arms share one vertical scale.
    """
    if arm["status"] != "ok":
        return None
    segments = results["perplexity"]["segments"]
    deltas = [segment["delta"][arm["arm"]] for segment in segments]
    known = [
        100 * delta
        for other in results["perplexity"]["arms"]
        if other["status"] == "ok"
        for segment in segments
        if (delta := segment["delta"][other["arm"]]) is not None
    ]
    left, right, top, bottom = 64, svg.WIDTH - 30, 12, 152
    x = svg.Scale(-0.5, len(segments) - 0.5, left, right)
    y = svg.Scale(*svg.padded([0.0, *known]), bottom, top)
    marks = _article_bands(segments, x, top, bottom)
    marks += _y_axis(y, left, right, "", about=4)
    marks += [
        svg.line(left, y(0), right, y(0), "zero"),
        svg.line(
            left, y(100 * arm["mean_delta_nll"]), right, y(100 * arm["mean_delta_nll"]), "mean"
        ),
    ]
    style = _style(arm, method_colours(results))
    for index, delta in enumerate(deltas):
        if delta is not None:
            place = segments[index]["article"] or "no heading"
            title = f"window {segments[index]['index']} ({place}): {100 * delta:+.3f} %"
            marks.append(svg.dot(x(index), y(100 * delta), 3, f"mark small {style}", title=title))
    last = len(segments) - 1
    marks += [
        svg.text(left, bottom + 18, "window 0", "tick"),
        svg.text(right, bottom + 18, f"{last}", "tick", anchor="end"),
    ]
    return svg.drawing(svg.WIDTH, bottom + 26, f"Difference per window, {arm['arm']}", marks)


def method_colours(results: Json) -> dict[str, int]:
    """Colour index per method, in order of appearance."""
    methods = dict.fromkeys(arm["method"] for arm in results["perplexity"]["arms"])
    return {method: index % COLOURS for index, method in enumerate(methods)}


def _article_bands(segments: list[Json], x: svg.Scale, top: float, bottom: float) -> list[str]:
    """A grey band behind every second article; nothing where the text has no headings."""
    bands, start, parity = [], 0, 0
    for index in range(1, len(segments) + 1):
        ended = (
            index == len(segments) or segments[index]["article"] != segments[index - 1]["article"]
        )
        if ended:
            if parity % 2 and segments[start]["article"] is not None:
                x0, x1 = x(start - 0.5), x(index - 0.5)
                bands.append(svg.rect(x0, top, x1 - x0, bottom - top, "band"))
            start, parity = index, parity + 1
    return bands


def _x_axis(x: svg.Scale, top: float, bottom: float, title: str) -> list[str]:
    steps = svg.ticks(x.low, x.high)
    marks = [svg.line(x(value), top, x(value), bottom, "grid") for value in steps]
    marks += [
        svg.text(x(v), bottom + 18, svg.tick_label(v, steps), "tick", anchor="middle")
        for v in steps
    ]
    marks.append(svg.text((x.start + x.end) / 2, bottom + 38, title, "axis", anchor="middle"))
    return marks


def _y_axis(y: svg.Scale, left: float, right: float, title: str, *, about: int = 5) -> list[str]:
    steps = svg.ticks(y.low, y.high, about)
    marks = [svg.line(left, y(value), right, y(value), "grid") for value in steps]
    marks += [
        svg.text(left - 8, y(v) + 4, svg.tick_label(v, steps), "tick", anchor="end") for v in steps
    ]
    if title:
        middle = (y.start + y.end) / 2
        marks.append(
            f'<g transform="translate(14 {middle:.1f}) rotate(-90)">'
            f"{svg.text(0, 0, title, 'axis', anchor='middle')}</g>"
        )
    return marks


def _bounds(arm: Json) -> tuple[float, float]:
    """The interval in percent; the point itself where there is none."""
    if arm["ci95"] is None:
        return arm["delta_percent"], arm["delta_percent"]
    low, high = arm["ci95"]
    return text.percent_of_nats(low), text.percent_of_nats(high)


def _delta_words(arm: Json, decimals: int) -> str:
    delta = text.signed(arm["delta_percent"], decimals)
    return f"{delta} {text.interval_percent(arm['ci95'], decimals)}".replace("-", "\u2212")


def _identity_percent(results: Json) -> float:
    identity = results["perplexity"]["noise_floor"]["identity"]
    rms = None if identity is None else identity["rms"]
    return 0.0 if rms is None else text.percent_of_nats(rms)


def _style(arm: Json, colour: dict[str, int]) -> str:
    return f"c{colour[arm['method']]}{' hollow' if arm['simulated'] else ''}"
