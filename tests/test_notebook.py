"""Notebooks: the quick start as it is run, and what evaluations look like in a kernel."""

from __future__ import annotations

import ast
import io
import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

import layersweep
from layersweep.cli.app import run as command
from layersweep.errors import Fallback, GateError, InputError, LayersweepWarning
from layersweep.notebook import Bars, NotebookProgress, in_notebook, tell
from layersweep.progress import SweepProgress
from layersweep.report import cell, html
from layersweep.report.perplexity import html as tables
from layersweep.report.store import load_results, validate
from layersweep.stream.host import HostStage
from layersweep.stream.pinned import HostBuffer
from layersweep.study.study import Study
from layersweep.sweep.model import Model

PROJECT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(PROJECT / "tools/execute_notebook.py"))
COMMITTED = nbformat.read(TOOL["NOTEBOOK"], as_version=4)
ARMS = ("trellis:K3V2@fit=1@found=1", "trellis:K4V2@fit=1@found=1", "e8:K3V2")


@pytest.fixture(scope="module")
def fresh() -> nbformat.NotebookNode:
    """The notebook with the outputs of a run, by the tool that writes the committed ones."""
    return TOOL["execute"]()


def outputs(notebook: nbformat.NotebookNode, name: str) -> list[Any]:
    (found,) = [one for one in notebook.cells if one.id == name]
    return found.outputs


def shown(notebook: nbformat.NotebookNode, name: str, kind: str) -> str:
    """A cell's result, its last expression, as `kind`."""
    (result,) = [o for o in outputs(notebook, name) if o.output_type == "execute_result"]
    return str(result.data[kind])


# --- the notebook -------------------------------------------------------------------------------


def test_no_cell_raises_and_no_command_fails(fresh: nbformat.NotebookNode) -> None:
    assert TOOL["failed_commands"](fresh) == []  # `execute` raises for a cell


@pytest.mark.parametrize("words", ["error: K9\n", "Traceback (most recent call last):\n  File"])
def test_a_command_that_failed_is_seen(words: str) -> None:
    output = nbformat.v4.new_output("stream", text=f"first\n{words}")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])])
    assert len(TOOL["failed_commands"](notebook)) == 1


def test_every_cell_gives_the_kinds_of_output_that_are_committed(
    fresh: nbformat.NotebookNode,
) -> None:
    def kinds(notebook: nbformat.NotebookNode) -> dict[str, list[Any]]:
        return {
            one.id: [(o.output_type, *sorted(o.get("data", ()))) for o in one.outputs]
            for one in notebook.cells
            if one.cell_type == "code"
        }

    assert kinds(fresh) == kinds(COMMITTED)
    assert sum(map(len, kinds(COMMITTED).values())) >= 10


def test_progress_ends_as_full_bars_that_stay(fresh: nbformat.NotebookNode) -> None:
    for notebook in (fresh, COMMITTED):
        (bars,) = [o for o in outputs(notebook, "evaluate") if o.output_type == "display_data"]
        drawn = re.findall(r'<progress value="(\d+)" max="(\d+)"', bars.data["text/html"])
        assert len(drawn) == 2 and all(value == total != "0" for value, total in drawn)
        assert re.search(r"sweep +#{32} (\d+)/\1, ", bars.data["text/plain"])


def test_results_and_figures_are_shown(fresh: nbformat.NotebookNode) -> None:
    for notebook in (fresh, COMMITTED):
        table = shown(notebook, "evaluate", "text/html")
        assert table.count("<table") == 3  # arms, pairs, needles
        assert all(f"<td>{arm}" in table for arm in ARMS)
        assert "17 M toy model" in table and "NOT PUBLISHABLE" in table
        assert "<svg" in shown(notebook, "figure-arms", "text/html")
        assert "<svg" in shown(notebook, "figure-needles", "text/html")


def test_committed_numbers_are_those_of_a_run(fresh: nbformat.NotebookNode) -> None:
    """The last digits are a processor's own."""
    numbers = [ast.literal_eval(shown(one, "numbers", "text/plain")) for one in (fresh, COMMITTED)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.05)
    assert tuple(numbers[0]) == ARMS
    rows = [arm_rows(shown(one, "evaluate", "text/plain")) for one in (fresh, COMMITTED)]
    assert list(rows[0]) == list(rows[1]) == ["exact", *ARMS]
    for arm in rows[0]:
        assert rows[0][arm] == pytest.approx(rows[1][arm], rel=2e-3), arm


def arm_rows(table: str) -> dict[str, list[float]]:
    """Bits, size and perplexity of each row."""
    line = re.compile(r"^([\w:@=]+)(?: \(sim\.\))? +([\d.]+) +([\d.]+)x +([\d.]+)", re.MULTILINE)
    return {arm: [float(one) for one in numbers] for arm, *numbers in line.findall(table)}


def test_what_is_saved_is_read_back_and_compared(fresh: nbformat.NotebookNode) -> None:
    assert shown(fresh, "save", "text/plain") == "True"
    (compared,) = outputs(fresh, "compare")
    # equal, bit for bit
    assert re.search(r"^trellis:K3V2@fit=1@found=1 .* 12/12 ", compared.text, re.MULTILINE)


def test_commands_in_cells_write_whole_lines(fresh: nbformat.NotebookNode) -> None:
    (written,) = outputs(fresh, "resume")
    assert not re.search(r"\x1b\[[\d;?]*[A-Zhl]", written.text)  # colours (m), no cursor
    assert "KL mean/p99.9" in written.text  # not the table of 80 columns


def test_nothing_of_a_machine_is_committed() -> None:
    text = TOOL["NOTEBOOK"].read_text("utf-8")
    assert not re.search(r"/(tmp|home|root|Users|usr)/| git [0-9a-f]{7}|-dirty", text)
    assert all(one.execution_count for one in COMMITTED.cells if one.cell_type == "code")


# --- results ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    with pytest.warns(LayersweepWarning, match="router is stored in 4 bits"):
        return layersweep.load("demo", device="cpu", vram="1GiB", ram="2GiB")


@pytest.fixture(scope="module")
def results(model: Model) -> layersweep.Results:
    return layersweep.evaluate(
        model, kv=["K3V2", "e8:K3V2"], tasks=["ppl"], segments=4, prefix=96, continuation=32
    )


def test_results_are_the_object_of_results_json(
    results: layersweep.Results, tmp_path: Path
) -> None:
    assert isinstance(results, dict)
    validate(results)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results.save(tmp_path / "run") == tmp_path / "run"
    assert load_results(tmp_path / "run") == results == layersweep.Results.read(tmp_path / "run")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"results.json", "report.html", "windows.csv"}


def test_printed_results_are_what_the_command_prints(
    results: layersweep.Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.save(tmp_path)
    capsys.readouterr()
    assert command(["report", str(tmp_path)]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert str(results).splitlines() == printed
    assert len(printed) > 8


def test_shown_results_have_the_tables_of_the_page(results: layersweep.Results) -> None:
    drawn = results._repr_html_()
    page = html.html_page(results)
    for table in (tables.arm_table(results), tables.pair_table(results, every=False)):
        assert table in drawn and table in page
    assert results.figure("arms").html.count("<svg") == 1
    assert results.figure("windows").html.count("<svg") == 2


def test_styles_stay_in_their_output(results: layersweep.Results) -> None:
    style = results._repr_html_().partition("<style>")[2].partition("</style>")[0]
    depth, outside = 0, ""
    for character in style:
        depth += (character == "{") - (character == "}")
        outside += character if depth == 0 else ""
    assert depth == 0 and outside.strip() == f".{cell.CLASS} }}"
    assert not re.search(r":root|\bbody\b", style)


@pytest.mark.parametrize(("name", "says"), [("pie", "arms, bits"), ("needles", "no needle")])
def test_a_figure_that_is_not_there_is_refused(
    results: layersweep.Results, name: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        results.figure(name)


def test_a_model_says_in_three_lines_what_it_is(model: Model) -> None:
    assert repr(model).splitlines()[0].startswith("demo: MixtralForCausalLM, 6 layers, 8 experts")
    assert repr(model).splitlines()[2] == "vram 1.00 GiB (--vram), ram 2.00 GiB (--ram)"


# --- progress, notes, errors --------------------------------------------------------------------


class FakeKernel:
    """What layersweep asks of IPython inside a kernel; keeps what was displayed."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.display = SimpleNamespace(display=self._display)

    def get_ipython(self) -> object:
        return SimpleNamespace(kernel=object())

    def update(self, drawn: object) -> None:
        self.shown.append(repr(drawn))

    def _display(self, drawn: Any, *, display_id: bool = False, raw: bool = False) -> FakeKernel:
        self.shown.append(drawn["text/plain"] if raw else repr(drawn))
        return self


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setitem(sys.modules, "IPython", fake)
    return fake


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr("layersweep.notebook.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_bars_tell_what_is_left_and_are_drawn_a_few_times_a_second(
    kernel: FakeKernel, clock: list[float]
) -> None:
    with NotebookProgress() as progress:
        for done in range(1, 101):
            clock[0] += 0.1
            progress("sweep", done, 200)
        assert (
            kernel.shown[-1] == f"sweep    {'#' * 16}{'.' * 16} 100/200, 10.0 s, about 10.0 s left"
        )
        assert 30 <= len(kernel.shown) <= 40
        progress("sweep", 200, 200)
    assert kernel.shown[-1] == f"sweep    {'#' * 32} 200/200, 10.0 s"


def test_a_second_sweep_starts_its_own_clock(kernel: FakeKernel, clock: list[float]) -> None:
    with NotebookProgress() as progress:
        for done in (1, 2, 1):
            clock[0] += 4
            progress("sweep", done, 2)
    assert kernel.shown[-1].endswith("1/2, 4.0 s, about 4.0 s left")


def test_bars_of_a_run_that_failed_say_so(kernel: FakeKernel, clock: list[float]) -> None:
    with pytest.raises(GateError), NotebookProgress() as progress:
        progress("sweep", 1, 4)
        raise GateError("layer 0")
    assert kernel.shown[-1].endswith("1/4, 0.0 s, stopped")


def test_names_in_bars_are_escaped() -> None:
    bars = Bars()
    with NotebookProgress() as progress:
        progress._bars = bars
        progress._drawn = float("inf")  # never: there is no kernel here
        progress("<b>", 1, 2)
    assert "&lt;b&gt;" in bars._repr_html_() and "<b>" not in bars._repr_html_()


def gate_only(model: Model, progress: bool | None) -> layersweep.Results:
    return layersweep.evaluate(model, kv=["K3V2"], gate="only", progress=progress)


def test_progress_shows_itself_where_somebody_looks(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("layersweep.progress.PLAIN_EVERY_S", 0.0)
    gate_only(model, None)
    gate_only(model, False)
    assert capsys.readouterr() == ("", "")
    gate_only(model, True)
    written = capsys.readouterr()
    assert written.out == "" and "sweep " in written.err
    monkeypatch.setitem(sys.modules, "IPython", fake := FakeKernel())
    gate_only(model, False)
    assert fake.shown == []
    gate_only(model, None)
    assert "sweep " in fake.shown[-1] and capsys.readouterr() == ("", "")


def test_fallbacks_are_told_at_the_callers_line(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallback = Fallback("codec", "a kernel", "plain torch", "no compiler")
    monkeypatch.setattr(Study, "fallbacks", property(lambda study: [fallback]))
    with pytest.warns(LayersweepWarning, match=r"^fallback: codec: wanted a kernel, used") as seen:
        layersweep.evaluate(model, kv=["K3V2"], gate="only")
    assert [Path(one.filename).name for one in seen] == [Path(__file__).name]


def test_scoring_tells_fallbacks_as_an_evaluation_does(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallback = Fallback("host ring", "1 GiB pinned", "pageable memory", "refused")

    def ring(stage: HostStage) -> HostBuffer:
        stage.say(fallback)
        return HostBuffer(stage.placement.host_ring)

    monkeypatch.setattr(HostStage, "_open_ring", ring)
    with pytest.warns(LayersweepWarning, match="^fallback: host ring: wanted 1 GiB pinned") as seen:
        model.score([[1, 2, 3]])
    assert [Path(one.filename).name for one in seen] == [Path(__file__).name]


def test_in_a_notebook_lines_are_displayed(kernel: FakeKernel) -> None:
    assert in_notebook()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell("note: this")
        layersweep.load("demo", device="cpu")
    assert kernel.shown == ["note: this", "note: the router is stored in 4 bits"]


def test_a_kernel_shows_message_and_hint_in_place_of_a_traceback() -> None:
    source = (
        f"import sys; sys.path.insert(0, {str(PROJECT / 'src')!r})\n"
        "from layersweep.errors import GateError\n"
        "raise GateError('layer 3: all experts alike', hint='--dtype bfloat16')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, allow_errors=True, kernel_name="python3", timeout=60).execute()
    (error,) = notebook.cells[0].outputs
    assert error.traceback == ["GateError: layer 3: all experts alike", "hint: --dtype bfloat16"]


def test_a_script_shows_the_hint_behind_the_traceback() -> None:
    assert InputError("found", hint="do this").__notes__ == ["hint: do this"]
    assert not hasattr(InputError("found"), "__notes__")


@pytest.mark.parametrize("inside", [False, True])
def test_live_bars_need_a_terminal_with_a_cursor(
    inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    if inside:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    stream = io.StringIO()
    with SweepProgress(Console(file=stream, force_terminal=True, width=100)) as progress:
        progress("sweep", 1, 2)
    assert ("\x1b[" in stream.getvalue()) is not inside
