"""What every report says about a run, in words and formatted cells; how it looks is decided later.

The caption stands above every table and figure: a figure that travels must carry its protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layersweep.report import text
from layersweep.statistics.paired import group_windows, wilson_interval

Json = dict[str, Any]

TOY = "17 M toy model"
SHOWN_PAIRS = 6
PAIR_NOTE = (
    "z of a pair: difference over its SEM; ratio: first loss over second loss, percentile bootstrap"
)


@dataclass(frozen=True)
class Caption:
    """`model`: whose weights; the others: what was measured on them, None where it was not."""

    model: str
    protocol: str | None
    needle: str | None


@dataclass(frozen=True)
class ArmRow:
    """One line of the perplexity table; every field is ready to print, percent where it says so."""

    arm: str
    simulated: bool
    ok: bool
    bits: str
    size: str
    ppl: str
    delta: str
    interval: str
    sem: str
    z: str
    worse: str
    kl: str
    top1: str

    @property
    def label(self) -> str:
        return f"{self.arm} (sim.)" if self.simulated else self.arm


@dataclass(frozen=True)
class PairRow:
    """One codec against another on the same windows; `ratio` holds its interval."""

    a: str
    b: str
    delta: str
    interval: str
    p: str
    z: str
    ratio: str

    @property
    def line(self) -> str:
        difference = f"{self.a} - {self.b}  {self.delta} % {self.interval}"
        return f"{difference}  {self.p}, z {self.z}  ratio {self.ratio}"


@dataclass(frozen=True)
class NeedleRow:
    """One arm's needles: `count` holds k/n and its interval, `against` the comparison to exact."""

    arm: str
    count: str
    against: str


def caption(results: Json) -> Caption:
    """The two lines of every table and figure."""
    model = results["model"]
    name = f"demo ({TOY})" if model["source"] == "demo" else model["source"]
    if model["revision"]:
        name += f"@{model['revision'][:12]}"
    router = f", router {_shout(model['router'])}" if model["router"] else ""
    weights = f"weights {_shout(model['weights'])}{router}"
    return Caption(
        model=f"{name}  {weights}: deltas are KV-only ON THESE WEIGHTS",
        protocol=_protocol_line(results) if results["perplexity"] else None,
        needle=_needle_line(results) if results["needle"] else None,
    )


def caption_lines(results: Json, *, needle: bool = False) -> list[str]:
    """The model's line and that of the protocol under which the figure was measured."""
    lines = caption(results)
    return [line for line in (lines.model, lines.needle if needle else lines.protocol) if line]


def perplexity_rows(results: Json) -> list[ArmRow]:
    """The baseline first, then every arm in the order it was asked for."""
    section = results["perplexity"]
    exact = ArmRow(
        arm="exact",
        simulated=False,
        ok=True,
        bits="16.00",
        size="1.0x",
        ppl=text.fixed(section["baseline"]["ppl"], 3),
        **dict.fromkeys(("delta", "interval", "sem", "z", "worse", "kl", "top1"), ""),
    )
    decimals = percent_decimals(results)
    return [exact, *(_arm_row(arm, section, decimals) for arm in section["arms"])]


def percent_decimals(results: Json) -> int:
    # transforms without quantization cost a millionth of a percent: not the scale of the others
    arms = [arm for arm in results["perplexity"]["arms"] if arm["method"] != "identity"]
    return text.decimals_for([arm["sem"] for arm in arms or results["perplexity"]["arms"]])


def pair_rows(results: Json, *, every: bool) -> list[PairRow]:
    """Codec-to-codec lines: two methods at equal bits of keys and values, whatever their options;
    all pairs if `every` or where there are few."""
    section = results["perplexity"]
    bits = {arm["arm"]: (arm["key_bits"], arm["value_bits"]) for arm in section["arms"]}
    method = {arm["arm"]: arm["method"] for arm in section["arms"]}
    rivals = [
        pair
        for pair in section["pairs"]
        if bits[pair["a"]] == bits[pair["b"]] and method[pair["a"]] != method[pair["b"]]
    ]
    few = len(section["pairs"]) <= SHOWN_PAIRS
    chosen = section["pairs"] if every or (few and not rivals) else rivals
    decimals = text.decimals_for([pair["sem"] for pair in chosen])
    return [
        PairRow(
            a=pair["a"],
            b=pair["b"],
            delta=text.signed(text.percent_of_nats(pair["mean_delta_nll"]), decimals),
            interval=text.interval_percent(pair["ci95"], decimals),
            p=text.p_value(pair["p"], "Holm p"),
            z=text.fixed(pair.get("z"), 1),  # files of earlier versions have neither z nor ratio
            ratio=text.ratio(pair.get("loss_ratio"), pair.get("loss_ratio_ci95")),
        )
        for pair in chosen
    ]


def uncertainty_line(results: Json) -> str:
    """Where the SEM and the interval come from, the noise floor and the detectable effect."""
    section = results["perplexity"]
    parts = [f"SEM and BCa interval over {grouping(results)}, z from the iid SEM"]
    floor = section["noise_floor"]
    if floor["identity"]:
        identity = abs(text.percent_of_nats(floor["identity"]["mean"]))
        parts.append(f"noise floor {identity:.2g} %")
    if floor["exact"]:
        parts.append(f"exact again {100 * abs(floor['exact']['mean']):.2g} %")
    detectable = [arm["mde_percent"] for arm in section["arms"] if arm["mde_percent"] is not None]
    if detectable:
        parts.append(f"MDE {max(detectable):.2g} %")
    return "; ".join(parts)


def grouping(results: Json) -> str:
    """ "27 articles" or "20 blocks of 4 windows", as the statistics grouped them."""
    articles = [segment["article"] for segment in results["perplexity"]["segments"]]
    groups = group_windows(articles)
    blocks = group_windows([None] * len(articles))
    by_block = bool((groups == blocks).all())
    count = len(set(groups.tolist()))
    return f"{count} blocks of 4 windows" if by_block else f"{count} articles"


def warnings(results: Json) -> list[str]:
    """What a reader must know before believing the numbers, besides the publishing line."""
    found = []
    if results["model"]["source"] == "demo":
        found.append(f"these are figures of a {TOY}; they say nothing about larger models")
    section = results["perplexity"]
    if section is not None:
        count = len(section["segments"])
        if section["underpowered"]:
            found.append(f"underpowered: {count} windows, 60 are needed for a claim")
        for arm in section["arms"]:
            if arm["status"] != "ok":
                found.append(f"{arm['arm']} gave non-finite values and was dropped")
            elif arm["below_noise_floor"]:
                found.append(f"{arm['arm']} is below the noise floor: no effect can be claimed")
    return found


def verdict(results: Json) -> str:
    if results["publishable"]:
        return "publishable: the run is complete and nothing that was asked for is missing"
    return f"NOT PUBLISHABLE because: {'; '.join(results['reasons'])}"


def needle_title(results: Json) -> str:
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


def needle_failure(results: Json) -> str | None:
    """The sentence for a baseline that fails, or None."""
    section = results["needle"]
    if section["baseline_gate"] == "passed":
        return None
    exact = section["arms"][0]
    count = text.count_of(exact["correct"], exact["n"], exact["wilson95"])
    return f"needle baseline FAILED: exact finds {count}, 80 % are needed; arms are not meaningful"


def context_counts(arm: Json, contexts: list[int]) -> list[str]:
    """k/n with its interval for each context length, from the counts by depth."""
    lines = []
    for context in contexts:
        cells = [cell for cell in arm["by_depth"] if cell["context"] == context]
        correct, n = sum(c["correct"] for c in cells), sum(c["n"] for c in cells)
        lines.append(f"{context}: {text.count_of(correct, n, wilson_interval(correct, n))}")
    return lines


def _protocol_line(results: Json) -> str:
    protocol = results["protocol"]
    quantized = ""
    if protocol["exact_pair_fraction"] is not None:
        quantized = f" ({100 * (1 - protocol['exact_pair_fraction']):.0f} % of attended pairs)"
    how = (
        f"{protocol['prefix']} prefix quantized after exact prefill{quantized}"
        if protocol["cache_mode"] == "prefill"
        else f"streaming, {protocol['prefix']} prefix, every token reads the quantized past"
    )
    bos = protocol["bos"]
    if bos == "auto":
        bos = "auto (none)" if protocol["bos_id"] is None else f"auto (id {protocol['bos_id']})"
    return (
        f"{protocol['text_source']}, {len(results['perplexity']['segments'])} windows, {how} | "
        f"{protocol['continuation'] - 1} scored, BOS {bos}, {_short(protocol['dtype'])}"
    )


def _needle_line(results: Json) -> str:
    section, protocol = results["needle"], results["protocol"]
    how = (
        "found: every answer token is the argmax"
        if section["mode"] == "teacher"
        else "found: the first number of a greedy answer"
    )
    return (
        f"haystack from {protocol['text_source']}, "
        f"context {'+'.join(map(str, section['contexts']))}, {len(section['trials'])} needles, "
        f"question and answer read the quantized cache | {how}, {_short(protocol['dtype'])}"
    )


def _arm_row(arm: Json, section: Json, decimals: int) -> ArmRow:
    pair = (section["segments"], arm["arm"])
    return ArmRow(
        arm=arm["arm"],
        simulated=arm["simulated"],
        ok=arm["status"] == "ok",
        bits=text.bits(arm["bits_per_element"]),
        size=text.factor(arm["compression"]),
        ppl=text.fixed(arm["ppl"], 3) if arm["status"] == "ok" else "nonfinite",
        delta=text.signed(arm["delta_percent"], decimals),
        interval=text.interval_percent(arm["ci95"], decimals),
        sem=text.fixed(None if arm["sem"] is None else 100 * arm["sem"], decimals + 1),
        z=text.fixed(arm["z"], 1),
        worse=_worse(*pair) if arm["status"] == "ok" else text.MISSING,
        kl=f"{text.two_digits(arm['kl_mean'])}/{text.two_digits(arm['kl_p999'])}",
        top1=text.fixed(None if arm["top1_agreement"] is None else 100 * arm["top1_agreement"], 1),
    )


def window_deltas(segments: list[Json], arm: str) -> list[float | None]:
    """arm - exact per window, nats; None where either is not finite."""
    pairs = [(segment["nll"].get(arm), segment["nll"].get("exact")) for segment in segments]
    return [None if there is None or here is None else there - here for there, here in pairs]


def _worse(segments: list[Json], arm: str) -> str:
    known = [delta for delta in window_deltas(segments, arm) if delta is not None]
    return f"{sum(delta > 0 for delta in known)}/{len(known)}"


def _against(arm: Json) -> str:
    if arm["lost"] is None:
        return ""
    words = (
        f"lost {arm['lost']} gained {arm['gained']}, {text.p_value(arm['mcnemar_p'], 'McNemar p')}"
    )
    if arm["answer_nll_delta"] is None:
        return words
    delta = arm["answer_nll_delta"]
    sign = "+" if delta >= 0 else ""
    spread = "" if arm["answer_nll_sem"] is None else f" +-{text.two_digits(arm['answer_nll_sem'])}"
    return f"{words}, answer NLL {sign}{text.two_digits(delta)}{spread}"


def _shout(word: str) -> str:
    return word.upper() if word in ("nf4", "fp4") else word


def _short(dtype: str) -> str:
    return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)
