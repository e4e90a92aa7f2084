"""The terminal's side of a conversation: the player's lines and commands, the persona's lines, live or in a pipe."""

import asyncio
import contextlib
import io
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from npc_runtime.chat import Reply, Talk, printable
from npc_runtime.client import RequestError

__all__ = ["ChatTerminal", "converse"]

HELP = """\
/again    another answer to what you said last
/seed N   the next answer is spoken with this seed
/quit     leave; so does Ctrl-D
Ctrl-C    cancels the answer that is being spoken; once more, or at the prompt, leaves"""


class ChatTerminal:
    """Reads the player's lines and shows the persona's. Data goes to stdout, all else to stderr."""

    def __init__(self, name: str, *, out: Console, chatter: Console, has_stats: bool) -> None:
        """`name` is put in front of the persona's lines on a terminal."""
        self._name = name
        self._out, self._chatter = out, chatter
        self._has_stats = has_stats
        self.is_asked = sys.stdin.isatty()
        if self.is_asked:
            with contextlib.suppress(ImportError):  # Windows; its console edits lines by itself
                import readline  # noqa: F401 - input() uses it
        elif isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")

    def lines(self) -> Iterator[str]:
        """Yield what the player says until the end of the input."""
        while True:
            try:
                text = self._read().strip()
            except EOFError:
                self.leave()
                return
            if text:
                yield text

    def leave(self) -> None:
        """End the line that the prompt is on."""
        if self.is_asked:
            self._chatter.print()

    def _read(self) -> str:
        if self.is_asked and self._out.is_terminal:
            return input("> ")
        if self.is_asked:
            self._chatter.print("> ", end="")
        return input()

    @contextlib.contextmanager
    def speaking(self) -> Iterator[Callable[[str], None]]:
        """Yield a callback that shows the text so far; in a pipe nothing, since it could not be taken back."""
        if not self._out.is_terminal:
            yield lambda text: None
            return
        with _no_echo(), Live(console=self._out, auto_refresh=False, transient=True, redirect_stdout=False) as live:
            yield lambda text: live.update(self._line(text + "▌"), refresh=True)

    def show(self, reply: Reply) -> None:
        """Print a line that is over."""
        if self._out.is_terminal:
            self._out.print(self._line(reply.text))
        elif reply.text:
            self._out.out(printable(reply.text), highlight=False)
        if not reply.is_said:
            self.complain(reply.problem)
        if self._has_stats:
            self.say(_describe(reply))

    def say(self, text: str) -> None:
        """Say something that is not the persona's."""
        self._chatter.print(Text(text, style="dim"), soft_wrap=True)

    def complain(self, text: str) -> None:
        """Say what went wrong."""
        self._chatter.print(Text(f"[{text}]", style="red"), soft_wrap=True)

    def _line(self, text: str) -> Text:
        return Text.assemble((f"{self._name}: ", "bold"), printable(text))


def converse(runner: asyncio.Runner, talk: Talk, terminal: ChatTerminal, seed: int | None) -> bool:
    """Let the two talk until the player leaves; returns whether every line was answered. Raises `DisconnectedError`.

    Ctrl-C reaches the runner while a line is spoken: the first cancels the line, the second is a `KeyboardInterrupt`.
    """
    is_well = True
    with contextlib.suppress(KeyboardInterrupt):
        for text in terminal.lines():
            word, _, rest = text.partition(" ")
            said: str | None = text
            if word == "/quit":
                return is_well
            if word == "/seed" and rest.strip().isdecimal():
                seed, said = int(rest), None
            elif word == "/again":
                said = runner.run(talk.take_back())
                if said is None:
                    terminal.complain("nothing was said yet")
            elif word.startswith("/"):
                said = None
                terminal.say(HELP)
            if said is not None:
                is_well = _answer(runner, talk, terminal, said, seed) and is_well
                seed = None
        return is_well
    terminal.leave()
    return is_well


def _answer(runner: asyncio.Runner, talk: Talk, terminal: ChatTerminal, text: str, seed: int | None) -> bool:
    try:
        with terminal.speaking() as draw:
            reply = runner.run(talk.say(text, seed, draw))
    except RequestError as error:
        terminal.complain(str(error))
        return False
    terminal.show(reply)
    return reply.is_said or reply.is_cancelled


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile out of the picture; the next prompt shows it."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    changed = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _describe(reply: Reply) -> str:
    """A line's times and tokens."""
    end = reply.end
    if end is None:
        return "no figures"
    first = "–" if end.timing.ttft_ms is None else f"{end.timing.ttft_ms:.0f} ms"
    parts = [
        f"first text {first}",
        f"{end.timing.tokens_per_s:.1f} tokens/s",
        f"{end.usage.completion} tokens",
        f"prompt {end.usage.prompt} ({end.usage.cached} known)",
        f"seed {end.seed}",
        end.reason,
    ]
    return " · ".join(parts + ([reply.note] if reply.note else []))
