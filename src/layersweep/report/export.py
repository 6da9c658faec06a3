"""The same numbers for papers and spreadsheets: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from layersweep.report import rows

Json = dict[str, Any]

ARM_FIELDS = (
    *("arm", "requested", "status", "method", "key_bits", "value_bits", "codec_version"),
    *("simulated", "encoder", "bits_per_element", "compression", "ppl", "delta_percent"),
    *("percent_mean_of_windows", "mean_delta_nll", "sem", "sem_iid", "z", "n", "n_negative"),
    *("n_worse", "significant_2sigma", "ci95_low", "ci95_high", "p_flip", "p_holm", "p_sign_iid"),
    *("p_wilcoxon_iid", "mde_percent", "below_noise_floor", "kl_mean", "kl_p50", "kl_p99"),
    *("kl_p999", "kl_max", "top1_agreement"),
)
COLUMNS = (
    ("arm", "label"),
    ("bits", "bits"),
    ("size", "size"),
    ("ppl", "ppl"),
    ("delta %", "delta"),
    ("95 % CI", "interval"),
    ("SEM", "sem"),
    ("z", "z"),
    ("worse", "worse"),
    ("KL mean/p99.9", "kl"),
    ("top-1 %", "top1"),
)
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def windows_csv(results: Json) -> str:
    """One line per window: index, article, tokens_sha, NLL of every arm (nats per token)."""
    segments = [] if results["perplexity"] is None else results["perplexity"]["segments"]
    arms = list(dict.fromkeys(arm for segment in segments for arm in segment["nll"]))
    head = ["index", "article", "tokens_sha", *(f"nll {arm}" for arm in arms)]
    lines = [
        [s["index"], s["article"], s["tokens_sha"], *(s["nll"].get(arm) for arm in arms)]
        for s in segments
    ]
    return _csv(head, lines)


def arms_csv(results: Json) -> str:
    """One line per arm with every field of results.json, undefined numbers empty."""
    arms = [] if results["perplexity"] is None else results["perplexity"]["arms"]
    lines = []
    for arm in arms:
        low, high = arm["ci95"] or (None, None)
        flat = arm | {"ci95_low": low, "ci95_high": high}
        lines.append([flat[field] for field in ARM_FIELDS])
    return _csv(ARM_FIELDS, lines)


def markdown(results: Json) -> str:
    """The table of the terminal, for a README or an issue."""
    parts = ["  \n".join(rows.caption_lines(results))]
    if results["perplexity"] is not None:
        parts.append(_markdown_table([name for name, _ in COLUMNS], _cells(results)))
        parts.append(f"{rows.uncertainty_line(results)}. Not comparable with other protocols.")
        pairs = rows.pair_rows(results, every=False)
        parts += [
            f"- {p.a} - {p.b}: {p.delta} % {p.interval}, {p.p}, z {p.z}, loss ratio {p.ratio}"
            for p in pairs
        ]
        parts += [f"{rows.PAIR_NOTE}."] if pairs else []
    if results["needle"] is not None:
        parts.append(f"{rows.needle_title(results)}:")
        body = [[row.arm, row.count, row.against] for row in rows.needle_rows(results)]
        parts.append(_markdown_table(["arm", "found", "against exact"], body, numbers=False))
        if failure := rows.needle_failure(results):
            parts.append(f"**{failure}**")
    parts += [f"Note: {line}." for line in rows.warnings(results)]
    parts.append(f"**{rows.verdict(results)}**")
    return "\n\n".join(parts) + "\n"


def latex(results: Json) -> str:
    """booktabs tables; the caption carries model, protocol, notes and verdict."""
    tables = []
    if results["perplexity"] is not None:
        words = [*rows.caption_lines(results), rows.uncertainty_line(results)]
        head = [name for name, _ in COLUMNS]
        tables.append(_latex_table(head, _cells(results), _closing(results, words), "r"))
    if results["needle"] is not None:
        words = [*rows.caption_lines(results, needle=True), rows.needle_title(results)]
        failure = rows.needle_failure(results)
        words += [failure] if failure else []
        body = [[row.arm, row.count, row.against] for row in rows.needle_rows(results)]
        head = ["arm", "found", "against exact"]
        tables.append(_latex_table(head, body, _closing(results, words), "l"))
    return "\n".join(tables)


def _closing(results: Json, words: list[str]) -> str:
    return ". ".join([*words, *rows.warnings(results), rows.verdict(results)]) + "."


def _cells(results: Json) -> list[list[str]]:
    return [[getattr(row, field) for _, field in COLUMNS] for row in rows.perplexity_rows(results)]


def _markdown_table(
    head: Sequence[str], body: Sequence[Sequence[str]], *, numbers: bool = True
) -> str:
    rule = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
    lines = [head, rule, *([cell.replace("|", r"\|") for cell in line] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _latex_table(
    head: Sequence[str], body: Sequence[Sequence[str]], caption: str, align: str
) -> str:
    def row(cells: Sequence[str]) -> str:
        # a row that starts with [ would be read as the optional argument of \\
        return " & ".join(f"{{{cell.translate(_LATEX)}}}" for cell in cells) + r" \\"

    lines = [
        r"\begin{table}",
        rf"\caption{{{caption.translate(_LATEX)}}}",
        rf"\begin{{tabular}}{{l{align * (len(head) - 1)}}}",
        r"\toprule",
        row(head),
        r"\midrule",
        *(row(line) for line in body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _csv(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return stream.getvalue()
