"""The same numbers for papers and spreadsheets: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from layersweep.report import caption
from layersweep.report.section import Export
from layersweep.report.sections import caption_lines, shown, warnings
from layersweep.tasks.arms import CONTEXTS

Json = dict[str, Any]

KV_BYTES = {f"kv_bytes_{at}": at for at in CONTEXTS}
ARM_FIELDS = (
    *("arm", "requested", "status", "method", "key_bits", "value_bits", "codec_version"),
    *("simulated", "encoder", "bits_per_element", "compression", *KV_BYTES, "ppl", "delta_percent"),
    *("percent_mean_of_windows", "mean_delta_nll", "sem", "sem_iid", "z", "n", "n_negative"),
    *("n_worse", "significant_2sigma", "ci95_low", "ci95_high", "p_flip", "p_holm", "p_sign_iid"),
    *("p_wilcoxon_iid", "mde_percent", "below_noise_floor", "kl_mean", "kl_p50", "kl_p99"),
    *("kl_p999", "kl_max", "top1_agreement"),
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
        sizes = arm.get("kv_bytes") or {}
        flat = arm | {"ci95_low": low, "ci95_high": high}
        flat |= {name: sizes.get(at) for name, at in KV_BYTES.items()}
        lines.append([flat[field] for field in ARM_FIELDS])
    return _csv(ARM_FIELDS, lines)


def markdown(results: Json) -> str:
    """The tables of the terminal, for a README or an issue."""
    parts = ["  \n".join(caption_lines(results))]
    for section in shown(results):
        export = section.export(results)
        parts += [*export.before, _markdown_table(export), *export.after]
    parts += [f"Note: {line}." for line in warnings(results)]
    parts.append(f"**{caption.verdict(results)}**")
    return "\n\n".join(parts) + "\n"


def latex(results: Json) -> str:
    """booktabs tables; the caption carries model, protocol, notes and verdict."""
    closing = [*warnings(results), caption.verdict(results)]
    tables = []
    for section in shown(results):
        export = section.export(results)
        words = [*caption_lines(results, section), *export.caption, *closing]
        tables.append(_latex_table(export, f"{'. '.join(words)}."))
    return "\n".join(tables)


def _markdown_table(export: Export) -> str:
    rule = ["---", *(["---:" if export.numbers else "---"] * (len(export.head) - 1))]
    body = [[cell.replace("|", r"\|") for cell in line] for line in export.body]
    return "\n".join(f"| {' | '.join(line)} |" for line in [export.head, rule, *body])


def _latex_table(export: Export, words: str) -> str:
    def row(cells: Sequence[str]) -> str:
        # a row that starts with [ would be read as the optional argument of \\
        return " & ".join(f"{{{cell.translate(_LATEX)}}}" for cell in cells) + r" \\"

    align = ("r" if export.numbers else "l") * (len(export.head) - 1)
    lines = [
        r"\begin{table}",
        rf"\caption{{{words.translate(_LATEX)}}}",
        rf"\begin{{tabular}}{{l{align}}}",
        r"\toprule",
        row(export.head),
        r"\midrule",
        *(row(line) for line in export.body),
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
