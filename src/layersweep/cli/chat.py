"""`layersweep chat`: talk to a model in the terminal, through the cache of your choice."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from layersweep.cli.exits import fail
from layersweep.cli.job import MachineOptions
from layersweep.cli.steps import Prepared, SamplingOptions, prepare, scheduled
from layersweep.errors import InputError
from layersweep.units import format_bytes

if TYPE_CHECKING:
    from layersweep.generate.conversation import Answer, Conversation
    from layersweep.kv.arms import Arm
    from layersweep.sweep.model import Model

HELP = """\
/reset      forget the conversation
/kv [ARM]   show the cache, or read on through another: exact, K3V2, int4 ...
/help       this
/exit       end, as Ctrl-D does
Ctrl-C stops an answer. A line that starts with a blank may start with a slash, too."""


def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model for chats.")],
    kv: Annotated[str, typer.Option(help="The cache: exact, or an arm.")] = "exact",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="The model's own by default; 0: the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep those above this share.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a conversation; the model's limit by default.")
    ] = None,
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    ram: Annotated[str, typer.Option(help="Host budget.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
) -> None:
    """Talk to a model. Answers go to stdout, everything else to stderr. /help says what you can
    type."""
    from layersweep.kv.arms import parse

    arm = parse(kv, growing=True)  # the cheapest refusal first: no torch yet
    options = SamplingOptions(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed
    )
    machine = MachineOptions(revision, vram, ram, device, dtype, weights, "float32", None)
    _talk(prepare(model, machine, options), arm, system, max_length)


def _talk(ready: Prepared, arm: Arm, system: str | None, longest: int | None) -> None:
    from layersweep.generate.conversation import Conversation
    from layersweep.kv.arms import parse
    from layersweep.text.chat import Message

    lead = [] if system is None else [Message("system", system)]
    ready.tokenizer.render_chat([*lead, Message("user", "hello")])  # before a weight is read
    arms = [arm, parse("K3V2", growing=True)]  # which /kv may ask for at any time
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with scheduled(ready, arms, console, most=1, longest=longest, brief=True) as steps:
        conversation = Conversation(steps, ready.tokenizer, ready.sampling, arm, system)
        terminal = Terminal(conversation, lambda arm: _cache(arm, ready.model), console, _reader())
        console.print(f"{terminal.cache()}. /help says what you can type.")
        terminal.run()


def _cache(arm: Arm, model: Model) -> str:
    from layersweep.tasks.kv_bytes import kv_bytes

    sizes = kv_bytes(arm, model.decoder, model.compute)
    size = f", {format_bytes(sizes['4096'])} a token at 4096 tokens" if sizes else ""
    return f"cache: {arm.name}{size}"


def _reader() -> Callable[[], str]:
    """Lines of stdin, with a prompt, editing and history where somebody types them. EOFError at
    the end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        return _read_line
    import readline  # noqa: F401  input() edits with it from here on

    return lambda: input("> ")


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


class Terminal:
    """Reads lines, obeys those that start with a slash, and has the others answered."""

    def __init__(
        self, conversation: Conversation, describe: Callable[[Arm], str], console: Console,
        read: Callable[[], str],
    ) -> None:  # fmt: skip
        self.conversation, self.console = conversation, console
        self._describe, self._read = describe, read
        self._commands = {"/reset": self._reset, "/kv": self._kv, "/help": self._help}

    def run(self) -> None:
        """Until /exit or the end of the input. A refusal is told, and the next line is read."""
        while (line := self._next()) != "/exit":
            try:
                self._obey(line)
            except InputError as refusal:
                fail(str(refusal), refusal.hint, 2)

    def _next(self) -> str:
        """The next line that is not empty; /exit at the end of the input."""
        while True:
            try:
                if line := self._read().rstrip():
                    return line
            except EOFError:
                self.console.print()
                return "/exit"
            except KeyboardInterrupt:
                self.console.print("\nCtrl-D or /exit ends.")

    def cache(self) -> str:
        return self._describe(self.conversation.arm)

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line.lstrip())
            return
        name, _, value = line.partition(" ")
        if name not in self._commands:
            raise InputError(
                f"found '{name}', needed one of {', '.join(self._commands)}, /exit",
                hint="start the line with a blank to say it to the model",
            )
        self._commands[name](value.strip())

    def _reset(self, value: str) -> None:
        self.conversation.reset()
        self.console.print("The conversation is forgotten.")

    def _kv(self, value: str) -> None:
        from layersweep.kv.arms import parse

        if value:
            self.conversation.use(parse(value, growing=True))
        self.console.print(self.cache())

    def _help(self, value: str) -> None:
        self.console.print(HELP)

    def _answer(self, said: str) -> None:
        with _Stop() as stop:
            try:
                answer, pieces = self.conversation.answer(said, lambda: stop.asked)
            except InputError as refusal:
                hint = f"/reset forgets the conversation; {refusal.hint}"
                raise InputError(str(refusal), hint=hint) from refusal
            for piece in pieces:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if answer.error:
            fail(f"answer: {answer.error}", "it is not part of the conversation", 1)
        self.console.print(_summary(answer), style="dim")


def _summary(answer: Answer) -> str:
    speed = answer.tokens_per_s
    parts = [f"{answer.tokens} tokens"]
    parts += [f"{speed:.1f} tokens/s"] if speed else []
    parts += [f"{answer.prompt} tokens read in {answer.reading_s:.2f} s"] if answer.tokens else []
    ends = {"length": "cut at the longest answer", "cancelled": "stopped"}
    parts += [ends[answer.finish]] if answer.finish in ends else []
    return f"[{', '.join(parts)}]"


def printable(text: str) -> str:
    """Without the control characters by which a model could drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else "\ufffd" for c in text)


class _Stop:
    """While it is open, Ctrl-C asks for the answer's end; pressed again, it ends the program."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        signal.signal(signal.SIGINT, self._before)
