"""results.json on disk, the terminal table, HTML, Markdown, LaTeX and CSV."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from functools import cache
from html.parser import HTMLParser

import jsonschema
import pytest
from results_builders import STUDY, SimulatedArm, build_results
from rich.console import Console

from layersweep.errors import InputError
from layersweep.report import svg, text
from layersweep.report.export import arms_csv, latex, markdown, windows_csv
from layersweep.report.html import html_page, write_html
from layersweep.report.perplexity import rows
from layersweep.report.store import (
    load_results,
    results_schema,
    validate,
    write_atomically,
    write_results,
)
from layersweep.report.table import print_report, report_table


@cache
def _study():
    return build_results(), build_results(windows=20, per_depth=2, baseline=0.55, source="o/m")


@pytest.fixture
def full():
    """80 windows, 60 needles, demo model."""
    return copy.deepcopy(_study()[0])


@pytest.fixture
def weak():
    """20 windows, 20 needles that the exact cache mostly misses, a named model."""
    return copy.deepcopy(_study()[1])


def printed(results, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(report_table(results, width=width))
    return console.file.getvalue()


class Page(HTMLParser):
    """Checks that tags close and collects what a reader sees."""

    void = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.words, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def read(page):
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    return parser


# ---- results.json


def test_schema_is_a_schema_and_holds_every_object_strictly(full):
    jsonschema.Draft202012Validator.check_schema(results_schema())
    validate(full)
    for place in (full, full["perplexity"], full["perplexity"]["arms"][0], full["needle"]):
        place["surprise"] = 1
        with pytest.raises(InputError, match="surprise"):
            validate(full)
        del place["surprise"]


@pytest.mark.parametrize("key", sorted(results_schema()["required"]))
def test_every_top_level_field_is_required(full, key):
    del full[key]
    with pytest.raises(InputError, match=key):
        validate(full)


@pytest.mark.parametrize("section", ["perplexity", "needle", "gate"])
def test_sections_that_were_not_asked_for_are_null(full, section):
    full[section] = None
    validate(full)
    assert full.keys() == set(results_schema()["required"])


def test_a_broken_field_is_named_with_its_place(full):
    full["perplexity"]["arms"][1]["z"] = "large"
    with pytest.raises(InputError, match=r"perplexity.*arms\[1\]\.z: 'large' is not of type"):
        validate(full)


def test_written_results_come_back_equal(full, tmp_path):
    path = write_results(tmp_path / "new" / "run", full)
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert load_results(path.parent) == full == load_results(path)


def test_nan_is_refused_and_the_old_file_stays(full, tmp_path):
    path = write_results(tmp_path, full)
    before = path.read_bytes()
    full["performance"]["wall_s"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, full)
    assert path.read_bytes() == before


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(target, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no such file"),
        ("{broken", "not JSON"),
        ("[1]", "found schema 'list'"),
        ('{"schema": "other/2"}', "found schema 'other/2', needed 'layersweep.results/2'"),
        ('{"schema": "layersweep.results/2"}', "'command' is a required property"),
    ],
)
def test_unusable_results_are_input_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_results(tmp_path)
    assert caught.value.hint


# ---- numbers as text


def test_numbers_are_spelled_one_way():
    assert text.bits(None) == "?"
    assert text.two_digits(0.0021) == ".0021"
    assert text.two_digits(-0.0034) == "-.0034"
    assert text.two_digits(1.25) == "1.2"
    assert text.signed(-0.001, 2) == "0.00"
    assert text.p_value(3e-9, "Holm p") == "Holm p<1e-6"
    assert text.p_value(0.031) == "p=0.031"
    assert text.interval_percent([0.003, 0.0044], 2) == "[+0.30,+0.44]"
    assert text.count_of(58, 60, (0.8864, 0.9908)) == "58/60 [89-99 %]"
    assert text.ratio(0.469, (0.381, 0.614)) == "0.47 [0.38,0.61]"
    assert text.ratio(None, None) == "-"
    assert text.decimals_for([0.0004, None]) == 2
    assert text.decimals_for([0.00002]) == 3


def test_ticks_are_round_and_inside():
    assert svg.ticks(-0.1, 1.0) == [0.0, 0.5, 1.0]
    assert svg.ticks(2.6, 3.5, 4) == [3.0, 3.5]
    assert svg.tick_label(-0.5, [-0.5, 0.0]) == "\u22120.5"


# ---- terminal


def test_table_holds_caption_rows_pairs_and_needles(full):
    out = printed(full)
    arm = full["perplexity"]["arms"][0]
    line = next(line for line in out.splitlines() if line.startswith("lloyd:K3V2 "))
    for cell in (
        "2.69",
        "5.9x",
        f"{arm['delta_percent']:+.2f}",
        f"{100 * arm['sem']:.3f}",
        f"{arm['z']:.1f}",
        f"{80 - arm['n_negative']}/80",
        "97.9",
    ):
        assert cell in line
    assert "17 M toy model" in out
    assert "weights NF4, router NF4: deltas are KV-only ON THESE WEIGHTS" in " ".join(out.split())
    assert "81 % of attended pairs" in " ".join(out.split())
    assert "e8:K3V2 (sim.)" in out
    assert "lloyd:K3V2 - e8:K3V2  -" in out
    assert "needle 4096, 60 (teacher): exact 59/60 [91-100 %]" in out
    assert "lost 2 gained 0" in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_table_fits_eighty_columns_without_cutting_numbers(full):
    out = printed(full, width=80)
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "\u2026" not in out
    arm = full["perplexity"]["arms"][3]
    assert f"{arm['delta_percent']:+.2f}" in out


def rival_pair(results):
    """lloyd:K3V2 - e8:K3V2 and, as it is printed, its ratio with its interval."""
    pairs = results["perplexity"]["pairs"]
    pair = next(p for p in pairs if (p["a"], p["b"]) == ("lloyd:K3V2", "e8:K3V2"))
    low, high = pair["loss_ratio_ci95"]
    return pair, f"{pair['loss_ratio']:.2f} [{low:.2f},{high:.2f}]"


def test_loss_ratio_and_z_of_a_pair_are_in_every_report(full):
    pair, ratio = rival_pair(full)
    line = next(line for line in printed(full).splitlines() if "lloyd:K3V2 - e8:K3V2" in line)
    assert line.endswith(f", z {pair['z']:.1f}  ratio {ratio}")
    assert f", z {pair['z']:.1f}, loss ratio {ratio}" in markdown(full)
    for out in (printed(full), markdown(full)):
        assert rows.PAIR_NOTE in out
    page = "|".join(read(html_page(full)).words)
    assert "z|loss ratio, 95 % CI" in page
    assert f"{pair['z']:.1f}|{ratio}".replace("-", "\u2212") in page


def test_rivals_are_two_methods_at_equal_bits_whatever_their_options(full):
    results = json.loads(json.dumps(full).replace('"lloyd:K3V2"', '"lloyd:K3V2@sink=4"'))
    validate(results)
    assert [(pair.a, pair.b) for pair in rows.pair_rows(results, every=False)] == [
        ("lloyd:K3V2@sink=4", "e8:K3V2"),
        ("lloyd:K4V2", "e8:K4V2"),
    ]


def test_a_ratio_without_bounds_is_a_dash(full):
    pair, ratio = rival_pair(full)
    pair |= {"loss_ratio": None, "loss_ratio_ci95": None}
    validate(full)
    assert f", z {pair['z']:.1f}  ratio -\n" in re.sub(" +\n", "\n", printed(full))
    assert f"z {pair['z']:.1f}, loss ratio -\n" in markdown(full)
    assert ratio not in "".join(read(html_page(full)).words)


def test_output_that_is_no_terminal_gets_the_full_table(full):
    console = Console(file=io.StringIO(), width=80)
    print_report(console, full)
    assert "KL mean/p99.9" in console.file.getvalue()


def test_output_that_is_no_terminal_is_as_wide_as_its_content():
    """trellis:K3V2@window=64 would fold into a second line at 100 columns."""
    long = SimulatedArm("trellis-with-a-long-name", 3, 2, 0.0052, 2.69, True, 0.99)
    results = build_results(arms=(long, STUDY[0]), windows=8, per_depth=1)
    console = Console(file=io.StringIO(), width=80)
    print_report(console, results)
    lines = console.file.getvalue().splitlines()
    (row,) = [line for line in lines if line.startswith("trellis-with-a-long-name:K3V2 (sim.) ")]
    arm = results["perplexity"]["arms"][0]
    assert row.rstrip().endswith(f"{100 * arm['top1_agreement']:.1f}")


def test_among_several_arms_of_a_method_those_with_equal_options_are_rivals(full):
    section = full["perplexity"]
    renamed = {"lloyd:K4V2": "lloyd:K3V2@sink=4", "e8:K4V2": "e8:K3V2@sink=4"}
    for arm in section["arms"]:
        arm["arm"] = renamed.get(arm["arm"], arm["arm"])
        arm["key_bits"] = 3
    for pair in section["pairs"]:
        pair |= {side: renamed.get(pair[side], pair[side]) for side in ("a", "b")}
    assert [(pair.a, pair.b) for pair in rows.pair_rows(full, every=False)] == [
        ("lloyd:K3V2", "e8:K3V2"),
        ("lloyd:K3V2@sink=4", "e8:K3V2@sink=4"),
    ]


def test_spot_check_and_reasons_are_said(weak):
    out = " ".join(printed(weak).split())
    assert "needle 4096, spot check of 20" in out
    assert "underpowered: 20 windows" in out
    assert "NOT PUBLISHABLE because: 20 perplexity windows, 60 are needed; 20 needles" in out
    assert "toy model" not in out


def test_failed_needle_baseline_is_red(weak):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    print_report(console, weak)
    red = [line for line in console.file.getvalue().splitlines() if "\x1b[1;31m" in line]
    assert any("needle baseline FAILED" in line for line in red)
    assert any("not meaningful" in line for line in red)


def test_unknown_bits_and_nonfinite_arms(full):
    first, second = full["perplexity"]["arms"][:2]
    first["bits_per_element"] = first["compression"] = None
    kept = ("arm", "requested", "method", "key_bits", "value_bits", "codec_version", "n")
    kept += ("simulated", "encoder", "bits_per_element", "compression")
    second |= {key: None for key in second if key not in kept} | {"status": "nonfinite"}
    full["perplexity"]["pairs"] = []
    validate(full)
    out = printed(full)
    assert re.search(r"lloyd:K3V2 +\? +\?", out)
    assert re.search(r"lloyd:K4V2 .*nonfinite", out)
    assert "lloyd:K4V2 gave non-finite values and was dropped" in out
    page = read(html_page(full))
    assert "lloyd:K4V2 gave non-finite values and was dropped" in "".join(page.words)
    assert "None" not in "".join(page.words)


def test_grouping_is_named_as_it_was_computed(full, weak):
    assert re.fullmatch(r"\d+ articles", rows.grouping(full))
    weak["perplexity"]["groups"] = {"kind": "blocks", "count": 5}
    assert rows.grouping(weak) == "5 blocks of 4 windows"
    weak["perplexity"]["groups"] = {"kind": "articles", "count": 1}
    assert rows.grouping(weak) == "1 article"


def test_several_contexts_are_counted_apart():
    results = build_results(per_depth=3, contexts=(1024, 4096), arms=STUDY[:1], tasks="niah")
    out = printed(results)
    assert "needle 1024+4096, 60 (teacher)" in out
    assert re.search(r"lloyd:K3V2 by context 1024: \d+/30 \[.*%\], 4096: \d+/30 \[", out)


# ---- HTML


def test_page_is_whole_and_asks_for_nothing(full, tmp_path):
    path = write_html(tmp_path, full)
    page = path.read_text(encoding="utf-8")
    parser = read(page)
    assert parser.links == []
    for outside in ("http://", "https://", "url(", "@import", "<script"):
        assert outside not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 3 + len(STUDY)  # forest, bits, depth; one per arm


def test_every_figure_carries_its_caption(full):
    page = html_page(full)
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)
    assert len(figures) == 7  # arms, forest, bits, pairs, windows, needles, depth
    for figure in figures:
        assert "17 M toy model" in figure
        assert "ON THESE WEIGHTS" in figure
        assert "511 scored" in figure or "60 needles" in figure


def test_page_never_says_what_it_must_not(full, weak):
    for results in (full, weak):
        words = "".join(read(html_page(results)).words)
        assert "lossless" not in words.lower()
        assert "not comparable with other tools' protocols" in words
    assert "NOT PUBLISHABLE" in words
    assert "needle baseline FAILED" in words
    assert "17 M toy model" not in words


def test_transcripts_are_escaped_and_complete(full):
    full["needle"]["trials"][0]["outputs"]["e8:K3V2"] = "<script>alert(1)</script> & more"
    full["needle"]["trials"][0]["correct"]["e8:K3V2"] = False
    full["command"] = "layersweep eval '<img src=x>'"
    page = html_page(full)
    assert "<script" not in page
    assert "<img" not in page
    assert "<script>alert(1)</script> & more" in "".join(read(page).words)


def test_hollow_marks_are_simulated_arms(full):
    page = html_page(full)
    forest = re.search(r'<svg[^>]*aria-label="Perplexity difference per arm".*?</svg>', page)[0]
    marks = re.findall(r'<circle[^>]*class="([^"]*)"', forest)
    assert [("hollow" in mark) for mark in marks] == [arm.simulated for arm in STUDY]


def test_cells_of_the_heatmap_have_intervals(full):
    page = html_page(full)
    cells = re.findall(r"<g><title>(.*?)</title>", page)
    assert len(cells) == 10 * (len(STUDY) + 1)
    assert all(re.search(r"\d/6 \[\d+-\d+ %\]$", cell) for cell in cells)


@pytest.mark.parametrize("tasks", ["ppl", "niah"])
def test_one_task_alone_makes_a_page_and_a_table(tasks):
    results = build_results(tasks=tasks, windows=8, per_depth=1, arms=STUDY[:1])
    validate(results)
    words = "".join(read(html_page(results)).words)
    assert ("Window by window" in words) == (tasks == "ppl")
    assert ("Needle in a haystack" in words) == (tasks == "niah")
    assert printed(results)


def test_a_refused_model_still_has_a_report(full):
    full |= {"status": "gate_failed", "perplexity": None, "needle": None, "publishable": False}
    full["reasons"] = ["the run is not complete (status: gate_failed)"]
    full["gate"]["passed"] = False
    full["gate"]["checks"][0] |= {"passed": False, "layer": 3}
    validate(full)
    words = "".join(read(html_page(full)).words)
    assert "REFUSED the model" in words
    assert "first copy loss, layer 3" in words
    assert "NOT PUBLISHABLE" in printed(full)


def test_a_run_of_the_gate_alone_says_that_it_passed(full):
    full["perplexity"] = full["needle"] = None
    passed = "gate passed, 2 checks: first copy loss, second copy gain\n"
    assert passed in printed(full)
    full["gate"] = None
    assert "gate" not in printed(full)


# ---- bytes of the cache per token

SIZES = "KiB/token at 4K/32K: exact 128/72, lloyd:K3V2 21.5/12.1, lloyd:K4V2 25.5/14.4, "


def test_every_report_says_what_a_token_takes_of_the_cache(full):
    lines = " ".join(printed(full).split())
    assert f"cache, {SIZES}e8:K3V2 23.6/13.3, e8:K4V2 27.4/15.4 " in lines
    assert SIZES in markdown(full) and SIZES in latex(full)
    assert "KiB/token at 4K/32K" in html_page(full) and "21.5/12.1" in html_page(full)


def test_one_figure_where_both_are_the_same_and_none_where_nobody_knows(full):
    arms = full["perplexity"]["arms"]
    full["perplexity"]["baseline"]["kv_bytes"] = {"4096": 524_288.0, "32768": 524_288.0}
    arms[0]["kv_bytes"] = None
    validate(full)
    lines = " ".join(printed(full).split())
    assert "4K/32K: exact 512, lloyd:K4V2 25.5/14.4" in lines


def test_results_that_say_nothing_of_it_are_still_shown(full):
    """As earlier versions wrote them, with the same schema."""
    for entry in (full["perplexity"]["baseline"], *full["perplexity"]["arms"]):
        del entry["kv_bytes"]
    validate(full)
    assert "KiB/token" not in printed(full) + markdown(full)
    assert next(csv.DictReader(io.StringIO(arms_csv(full))))["kv_bytes_32768"] == ""


# ---- Markdown, LaTeX, CSV


def test_windows_csv_has_one_line_per_window(full):
    lines = list(csv.DictReader(io.StringIO(windows_csv(full))))
    assert len(lines) == 80
    segment = full["perplexity"]["segments"][5]
    assert float(lines[5]["nll e8:K4V2"]) == segment["nll"]["e8:K4V2"]
    assert lines[5]["tokens_sha"] == segment["tokens_sha"]


def test_arms_csv_has_every_schema_field(full):
    lines = list(csv.DictReader(io.StringIO(arms_csv(full))))
    fields = set(results_schema()["$defs"]["arm"]["properties"]) - {"ci95", "kv_bytes"}
    flat = {"ci95_low", "ci95_high", "kv_bytes_4096", "kv_bytes_32768"}
    assert set(lines[0]) == fields | flat
    assert float(lines[0]["kv_bytes_4096"]) == full["perplexity"]["arms"][0]["kv_bytes"]["4096"]
    assert float(lines[0]["ci95_high"]) == full["perplexity"]["arms"][0]["ci95"][1]


def test_markdown_table_is_rectangular(full):
    out = markdown(full)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5 + 2 + 5
    assert {line.count("|") for line in table[:7]} == {12}
    assert "17 M toy model" in out
    assert "59/60 [91-100 %]" in out


def test_latex_escapes_and_says_the_caption(weak):
    weak["model"]["source"] = "org/my_model"
    out = latex(weak)
    assert r"org/my\_model" in out
    assert r"\toprule" in out
    assert "%" not in out.replace(r"\%", "")
    assert out.count(r"\begin{table}") == out.count(r"\end{table}") == 2
    assert "NOT PUBLISHABLE" in out


def test_results_are_plain_json(full):
    assert json.loads(json.dumps(full, allow_nan=False)) == full
