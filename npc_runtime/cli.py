"""The command line. Data goes to stdout, chatter to stderr; an error is one line and exit status 1.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import json
import logging
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npc_runtime import __version__
from npc_runtime.adapter_commands import adapter_app
from npc_runtime.daemon_commands import chat, doctor, top
from npc_runtime.engine.embedded import EMBEDDED_BASE
from npc_runtime.errors import NpcError
from npc_runtime.options import (
    DEFAULT_PORT,
    AsJson,
    Base,
    Personas,
    Project,
    Token,
    Url,
    default_personas,
    prepare_process,
)
from npc_runtime.persona_commands import persona_app
from npc_runtime.stopping import was_asked_to_stop

if TYPE_CHECKING:
    from npc_runtime.train import Epoch

__all__ = ["main"]

app = typer.Typer(
    help="Voices the NPCs of a game: one base model, a LoRA adapter per persona, one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor)
app.command()(chat)
app.command()(top)
app.add_typer(persona_app, name="persona")
app.add_typer(adapter_app, name="adapter", callback=prepare_process)


class DType(StrEnum):
    """What weights and activations are held in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"


class Part(StrEnum):
    """What `evaluate` can do."""

    MATRIX = "matrix"
    LINES = "lines"
    TESTS = "tests"


class Quantize(StrEnum):
    """In how many bits the base's linears are held."""

    AUTO = "auto"
    INT4 = "int4"
    NONE = "none"


class LogLevel(StrEnum):
    """What is left out of the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


DTypeOption = Annotated[DType, typer.Option(help="auto: bfloat16 where the hardware multiplies it.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; default: physical cores, of more than four all but one.")
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"npc-runtime {__version__}")
        raise typer.Exit


@app.command()
def serve(
    base: Base = EMBEDDED_BASE,
    personas: Personas = None,
    host: Annotated[str, typer.Option(help="Address to bind; anything but loopback needs the token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = DEFAULT_PORT,
    dtype: DTypeOption = DType.AUTO,
    threads: Threads = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="CPU: a seed replays a line to the last bit in any company; slower.")
    ] = False,
    quantize: Annotated[
        Quantize,
        typer.Option(help="auto: 4 bits on a GPU for a base of a billion weights or more that has none of its own."),
    ] = Quantize.AUTO,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Accept clients without a token (loopback only).")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name besides its own that the daemon is called by; may be given again."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Whose web pages may connect besides the daemon's own, with the token: http://localhost:8080.",
        ),
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Name of the runtime file, of one daemon at a time; default from --personas.")
    ] = None,
    owner_pid: Annotated[
        int | None, typer.Option(metavar="PID", min=1, help="End when this process is gone, whatever ended it.")
    ] = None,
    log_file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Default: in the user's log folder; - is stderr alone, and needs a reader."),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option()] = LogLevel.INFO,
    adapter_memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="Adapters on the device, and as much again for copies in main memory; default 2048. More personas "
            "than fit are fine: their adapters take turns.",
        ),
    ] = None,
    kv_memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="The KV cache: all lines that run, and prompts computed before; default 16384 tokens, at most 1024.",
        ),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", min=1, help="GPU: all that the daemon may take of its memory; the game has the rest."
        ),
    ] = None,
    max_adapter_rank: Annotated[
        int, typer.Option(min=1, max=128, help="Adapters of higher ranks are refused; a line pays for every 16.")
    ] = 64,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what is said, with times, into a new file for --replay.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Play what was recorded, without a base: for a game's own tests."),
    ] = None,
    replay_speed: Annotated[
        float, typer.Option(metavar="X", help="2 is twice as fast as recorded; inf is at once.")
    ] = 1.0,
) -> None:
    """Run the daemon until Ctrl-C. Its first line on stdout says port and token, as JSON; then it loads the base."""
    from npc_runtime.daemon_process import DaemonProcess, LogOptions, run_process
    from npc_runtime.discovery import project_of

    def run(process: DaemonProcess) -> None:
        from npc_runtime.console import progress_bars, stderr
        from npc_runtime.daemon import run_daemon
        from npc_runtime.logs import logged_progress
        from npc_runtime.settings import Settings

        settings = Settings(
            base=base,
            personas=folder,
            host=host,
            port=port,
            dtype=dtype.value,
            threads=threads,
            deterministic=deterministic,
            quantize=quantize.value,
            needs_token=not no_auth,
            adapter_mib=adapter_memory,
            kv_mib=kv_memory,
            gpu_mib=gpu_memory,
            max_adapter_rank=max_adapter_rank,
            allowed_hosts=tuple(allow_host or ()),
            allowed_origins=tuple(allow_origin or ()),
            record=record,
            replay=replay,
            replay_speed=replay_speed,
        )
        console = stderr()
        run_daemon(settings, process, lambda: progress_bars(console) if console.is_terminal else logged_progress())

    prepare_process()
    folder = personas or default_personas()
    options = LogOptions(log_file, logging.getLevelNamesMapping()[log_level.value.upper()])
    os._exit(run_process(run, project=project or project_of(folder), owner_pid=owner_pid, log=options))


@app.command()
def demo(
    as_json: AsJson = False,
    text: Annotated[str | None, typer.Option(help="What is shouted in the tavern.")] = None,
    base: Base = EMBEDDED_BASE,
    personas: Personas = None,
    dtype: DTypeOption = DType.AUTO,
    threads: Threads = None,
) -> None:
    """Start a daemon and play the tavern scene: one batch, a line for every persona."""
    import asyncio

    from rich.console import Console

    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.demo import SHOUT, play, show
    from npc_runtime.engine.bases import resolve_base
    from npc_runtime.own_daemon import serve_options
    from npc_runtime.persona import shipped_personas

    prepare_process()
    chatter = stderr()
    with progress_bars(chatter) as report:
        resolve_base(base, report)  # here, where its bar is seen, and not while the daemon is waited for
    folder = personas or shipped_personas()
    options = serve_options(base=base, personas=folder, command="demo", dtype=dtype.value, threads=threads)
    status = chatter.status(f"starting the daemon ({base}) …")
    status.start()
    try:
        with show(Console(highlight=False)) as draw:
            on_change = (lambda scene: None) if as_json else draw
            performance = asyncio.run(play(options, text or SHOUT, on_change, status.stop))
    finally:
        status.stop()
    if as_json:
        typer.echo(performance.to_json())
    else:
        _print_totals(performance.totals)
    if not performance.is_complete:
        raise typer.Exit(1)


@app.command()
def bench(
    npcs: Annotated[int, typer.Option(min=1, max=64, help="NPCs that speak at once; personas take turns.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=100)] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_024, help="Tokens of every line, exactly.")] = 100,
    url: Url = None,
    token: Token = None,
    project: Project = None,
    personas: Personas = None,
    as_json: AsJson = False,
) -> None:
    """Measure the running daemon: throughput, time to first text, time between texts."""
    import asyncio

    from npc_runtime.bench import measure
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.running import find_daemon

    prepare_process()
    target = find_daemon(project, personas or default_personas(), url=url, token=token)
    with progress_bars(stderr()) as report:
        label = f"{npcs} NPCs, {rounds} rounds"
        result = asyncio.run(
            measure(
                target,
                npcs=npcs,
                rounds=rounds,
                max_tokens=max_tokens,
                on_round=lambda number: report(label, number / rounds),
            )
        )
    typer.echo(result.to_json() if as_json else result.to_text())


@app.command()
def page(
    is_opened: Annotated[bool, typer.Option("--open", help="Open it in the browser instead of printing it.")] = False,
    project: Annotated[str | None, typer.Option(help="Name of the runtime file; default from --personas.")] = None,
    personas: Personas = None,
) -> None:
    """Print the link of the running daemon's status page; whoever has it can use the daemon."""
    from npc_runtime.discovery import project_of
    from npc_runtime.page_link import find_link, open_link

    name = project or project_of(personas or default_personas())
    link = find_link(name, f"project '{project}'" if project else f"personas {personas or default_personas()}")
    if is_opened:
        open_link(link, name)
    else:
        typer.echo(link)


@app.command("quantize")
def quantize_base(
    base: Base = EMBEDDED_BASE,
    out: Annotated[
        Path | None, typer.Option(help="An empty folder, for --base; default: the cache, where serve looks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make 4 bits of a base ahead of time; prints what that saves and how far the weights moved."""
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.engine.bases import resolve_base
    from npc_runtime.engine.device import choose_device
    from npc_runtime.engine.quantized import write_quantized
    from npc_runtime.engine.weights import describe_base, read_config

    prepare_process()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with progress_bars(stderr()) as report:
        path = resolve_base(base, report)
        read_config(path)  # refuses what is no base
        folder, result = write_quantized(
            describe_base(base, path),
            out,
            device=choose_device("auto").torch_device,
            on_progress=report,
        )
    if as_json:
        typer.echo(json.dumps({"base": base, "folder": str(folder), **asdict(result)}))
        return
    for kind, error in result.errors.items():
        typer.echo(f"{kind:<12} off by {error['median']:.1%}, the worst one by {error['worst']:.1%}")
    before, after = (f"{size / 1e6:,.0f} MB" for size in (result.bytes_before, result.bytes_after))
    typer.echo(f"{before} became {after}, in {folder}")


@app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="The persona's folder, with lines.jsonl and perhaps heldout.jsonl.")],
    base: Base = EMBEDDED_BASE,
    rank: Annotated[int, typer.Option(min=1, max=64, help="Twice as many make the adapter twice as large.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, max=100)] = 3,
    learning_rate: Annotated[float, typer.Option(min=1e-6, max=1e-1)] = 5e-4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="The adapter's folder; default: 'adapter' in the persona's.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of where a run was stopped.")] = False,
) -> None:
    """Train a persona's adapter, the epoch with the lowest held-out loss; a run that was stopped goes on."""
    from npc_runtime.console import progress_bars, stderr, step_bar
    from npc_runtime.engine.bases import base_name, resolve_base
    from npc_runtime.persona import Persona
    from npc_runtime.train import Recipe, train_persona

    prepare_process()
    persona = Persona.load(folder.resolve())
    target = (out or persona.folder / "adapter").resolve()
    chatter = stderr()
    with progress_bars(chatter) as report:
        path = resolve_base(base, report)
    with step_bar(chatter, f"training {persona.id}") as bar:
        results = train_persona(
            persona,
            path,
            base_name=base_name(base, path),
            recipe=Recipe(rank=rank, epochs=epochs, learning_rate=learning_rate, seed=seed),
            out=target,
            restart=restart,
            on_step=lambda done: bar.step(done.step, done.num_steps, f"loss {done.loss:.2f}", done.seconds_left),
            on_epoch=lambda epoch: bar.say(_describe_epoch(epoch)),
            on_note=bar.say,
        )
    for epoch in results:
        typer.echo(_describe_epoch(epoch))
    if all((persona.folder / ref.path).resolve() != target for ref in persona.adapter):
        hint = f"adapter: {Path(os.path.relpath(target, persona.folder)).as_posix()}"
        chatter.print(f"{persona.folder / 'persona.yaml'} does not use it yet; add: {hint}")


def _describe_epoch(epoch: "Epoch") -> str:
    kept = "  kept" if epoch.kept else ""
    return f"epoch {epoch.number}: train {epoch.train:.3f}, held-out {epoch.heldout:.3f}{kept}"


@app.command()
def evaluate(
    only: Annotated[
        list[str] | None, typer.Argument(metavar="[PERSONAS]...", help="Whom to judge; default: all.")
    ] = None,
    personas: Personas = None,
    base: Base = EMBEDDED_BASE,
    samples: Annotated[int, typer.Option(min=1, max=1_000, help="Generated lines for each persona.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated lines; tests have their own.")] = 0,
    part: Annotated[list[Part] | None, typer.Option(help="May be given again; default: all three.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the picture and the JSON.")] = None,
    dtype: DTypeOption = DType.AUTO,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Judge personas: held-out losses under every adapter, generated lines, and their tests.

    The exit status is 1 if a test in a persona's tests.yaml fails.
    """
    from rich.console import Console

    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.evaluate import Task, evaluate_personas, write_results
    from npc_runtime.evaluation.picture import check_pillow
    from npc_runtime.evaluation.tables import print_tables

    prepare_process()
    if out is not None:
        check_pillow()
    task = Task(
        personas=personas or default_personas(),
        base=base,
        only=tuple(only or ()),
        parts=tuple(entry.value for entry in part or Part),
        samples=samples,
        seed=seed,
        dtype=dtype.value,
        threads=threads,
    )
    with progress_bars(stderr()) as report:
        evaluation = evaluate_personas(task, report)
    if out is not None:
        write_results(evaluation, out)
    if as_json:
        typer.echo(evaluation.to_json())
    else:
        print_tables(evaluation, Console(highlight=False))
    if not evaluation.is_green:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; known errors become one line and exit status 1."""
    try:
        app()
    except Exception as error:
        if was_asked_to_stop():
            sys.exit(0)
        if not isinstance(error, NpcError):
            raise
        typer.echo(f"npc-runtime: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_totals(totals: dict[str, object]) -> None:
    typer.echo(
        f"\n{totals['ok']} lines, {totals['tokens']} tokens in {float(str(totals['wall_ms'])) / 1000:.1f} s "
        f"({totals['tokens_per_s']} tokens/s): {totals['forwards']} forward passes of the one base served them all."
    )
    typer.echo(
        "\nWhat to try next:\n"
        '  npc-runtime demo --text "There is a dragon on the roof!"\n'
        "  npc-runtime serve                             the daemon for your game; PROTOCOL.md is what it speaks\n"
        '  npc-runtime persona render odo --text "Hi."   the exact prompt of a line\n'
        "  npc-runtime train personas/odo                train an adapter from lines.jsonl"
    )
