"""The perplexity section in words and formatted cells; how it looks is decided later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layersweep.report import text
from layersweep.report.caption import short_dtype
from layersweep.tasks.arms import BASELINE, CONTEXTS

Json = dict[str, Any]

SHOWN_PAIRS = 6
GROUPS = {
    "articles": ("article", "articles"),
    "blocks": ("block of 4 windows", "blocks of 4 windows"),
}
PAIR_NOTE = (
    "z of a pair: difference over its SEM; ratio: first loss over second loss, percentile bootstrap"
)


@dataclass(frozen=True)
class ArmRow:
    """One line of the perplexity table; every field is ready to print, percent where it says so."""

    arm: str
    simulated: bool
    ok: bool
    bits: str
    size: str
    per_token: str
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


def protocol_line(results: Json) -> str:
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
        f"{protocol['continuation'] - 1} scored, BOS {bos}, {short_dtype(protocol['dtype'])}"
    )


def warnings(results: Json) -> list[str]:
    section = results["perplexity"]
    found = []
    if section["underpowered"]:
        count = len(section["segments"])
        found.append(f"underpowered: {count} windows, 60 are needed for a claim")
    for arm in section["arms"]:
        if arm["status"] != "ok":
            found.append(f"{arm['arm']} gave non-finite values and was dropped")
        elif arm["below_noise_floor"]:
            found.append(f"{arm['arm']} is below the noise floor: no effect can be claimed")
    return found + [
        f"the control {name} gave non-finite values: its noise floor is unknown"
        for name, control in controls(section)
        if control["rms"] is None
    ]


def arm_rows(results: Json) -> list[ArmRow]:
    """The baseline first, then every arm in the order it was asked for."""
    section = results["perplexity"]
    exact = ArmRow(
        arm=BASELINE,
        simulated=False,
        ok=True,
        bits="16.00",
        size="1.0x",
        per_token=_per_token(section["baseline"]),
        ppl=text.fixed(section["baseline"]["ppl"], 3),
        **dict.fromkeys(("delta", "interval", "sem", "z", "worse", "kl", "top1"), ""),
    )
    decimals = percent_decimals(results)
    return [exact, *(_arm_row(arm, decimals) for arm in section["arms"])]


def percent_decimals(results: Json) -> int:
    # transforms without quantization cost a millionth of a percent: not the scale of the others
    arms = [arm for arm in results["perplexity"]["arms"] if arm["method"] != "identity"]
    return text.decimals_for([arm["sem"] for arm in arms or results["perplexity"]["arms"]])


def pair_rows(results: Json, *, every: bool) -> list[PairRow]:
    """Codec-to-codec lines: methods at equal bits; all pairs if `every` or where there are few."""
    section = results["perplexity"]
    arms = {arm["arm"]: arm for arm in section["arms"]}
    rivals = [pair for pair in section["pairs"] if _rivals(arms[pair["a"]], arms[pair["b"]])]
    # where arms of both methods have the same options, others say nothing more
    alike = [pair for pair in rivals if _options(pair["a"]) == _options(pair["b"])]
    covered = {side for pair in alike for side in (pair["a"], pair["b"])}
    rivals = [pair for pair in rivals if pair in alike or not {pair["a"], pair["b"]} & covered]
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
            z=text.fixed(pair["z"], 1),
            ratio=text.ratio(pair["loss_ratio"], pair["loss_ratio_ci95"]),
        )
        for pair in chosen
    ]


def uncertainty_line(results: Json) -> str:
    """Where the SEM and the interval come from, the noise floor and the detectable effect."""
    section = results["perplexity"]
    parts = [f"SEM and BCa interval over {grouping(results)}, z from the iid SEM"]
    floor = section["noise_floor"]
    for words, control in (("noise floor", floor["identity"]), ("exact again", floor["exact"])):
        if control and control["rms"] is not None:
            parts.append(f"{words} {text.percent_of_nats(control['rms']):.2g} %")
    detectable = [arm["mde_percent"] for arm in section["arms"] if arm["mde_percent"] is not None]
    if detectable:
        parts.append(f"MDE {max(detectable):.2g} %")
    return "; ".join(parts)


PER_TOKEN = f"KiB/token at {'/'.join(CONTEXTS.values())}"


def sizes_line(results: Json) -> str:
    """What a token takes of each arm's cache, all layers together; "" where no file says."""
    sizes = [f"{row.arm} {row.per_token}" for row in arm_rows(results) if row.per_token != "?"]
    return f"cache, {PER_TOKEN}: {', '.join(sizes)}" if sizes else ""


def grouping(results: Json) -> str:
    """ "27 articles" or "20 blocks of 4 windows", as the statistics grouped them."""
    groups = results["perplexity"]["groups"]
    one, many = GROUPS[groups["kind"]]
    return f"{groups['count']} {one if groups['count'] == 1 else many}"


def controls(section: Json) -> list[tuple[str, Json]]:
    """Every control with its name: the exact cache again, then each method's identity."""
    floor = section["noise_floor"]
    named = [("exact again", floor["exact"])] if floor["exact"] else []
    by_method = floor["identity"]["by_method"] if floor["identity"] else {}
    return [*named, *((f"identity, {method}", noise) for method, noise in by_method.items())]


def _arm_row(arm: Json, decimals: int) -> ArmRow:
    return ArmRow(
        arm=arm["arm"],
        simulated=arm["simulated"],
        ok=arm["status"] == "ok",
        bits=text.bits(arm["bits_per_element"]),
        size=text.factor(arm["compression"]),
        per_token=_per_token(arm),
        ppl=text.fixed(arm["ppl"], 3) if arm["status"] == "ok" else "nonfinite",
        delta=text.signed(arm["delta_percent"], decimals),
        interval=text.interval_percent(arm["ci95"], decimals),
        sem=text.fixed(None if arm["sem"] is None else 100 * arm["sem"], decimals + 1),
        z=text.fixed(arm["z"], 1),
        worse=f"{arm['n_worse']}/{arm['n']}" if arm["status"] == "ok" else text.MISSING,
        kl=f"{text.two_digits(arm['kl_mean'])}/{text.two_digits(arm['kl_p999'])}",
        top1=text.fixed(None if arm["top1_agreement"] is None else 100 * arm["top1_agreement"], 1),
    )


def _per_token(arm: Json) -> str:
    """ "20.6/20.5", or one figure where both are the same."""
    found = arm.get("kv_bytes") or {}  # not in earlier files
    sizes = [text.kib(found.get(at)) for at in CONTEXTS]
    return "/".join(dict.fromkeys(sizes))


def _rivals(a: Json, b: Json) -> bool:
    """Two methods at equal bits of keys and of values."""
    bits = [(arm["key_bits"], arm["value_bits"]) for arm in (a, b)]
    return a["method"] != b["method"] and bits[0] == bits[1]


def _options(arm: str) -> str:
    """ "pb=2" of "lloyd:K3V2@pb=2"."""
    return arm.partition("@")[2]
