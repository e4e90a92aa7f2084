"""`npc-runtime evaluate`: how far each persona is itself, by loss, by generated lines and by its own tests.

Losses are computed by what a daemon computes with. Lines are spoken, on a CPU, in its deterministic mode: a line then
depends neither on how many others are evaluated nor on their order, and a green test stays green when one is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import DTypeName, choose_device, choose_threads
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.errors import InvalidError, StartupError
from npc_runtime.evaluation.attribution import Classifier, cross_validate
from npc_runtime.evaluation.authored import Authored, read_authored
from npc_runtime.evaluation.cases import Case, find_failures, read_cases
from npc_runtime.evaluation.checks import Inspector
from npc_runtime.evaluation.losses import LossMatrix, Passage, measure_losses
from npc_runtime.evaluation.picture import draw_evaluation
from npc_runtime.evaluation.report import CaseResult, Evaluation, Lines, SpokenLine
from npc_runtime.evaluation.speaking import Cue, Reply, seed_of, speak
from npc_runtime.loading import LoadedBase, load_adapters, load_base, make_store
from npc_runtime.persona import Library, Persona

__all__ = ["PARTS", "Part", "Task", "evaluate_personas", "write_results"]

Part = Literal["matrix", "lines", "tests"]
PARTS: tuple[Part, ...] = get_args(Part)

KV_TOKENS = 8_192
"""Room for 64 lines of the length that personas have, and still at most 1 GiB of an 8B model."""


@dataclass(frozen=True, slots=True)
class Task:
    """What was asked for."""

    personas: Path
    base: str
    only: tuple[str, ...] = ()  # ids of the personas to judge; () for all. Adapters of all are compared
    parts: tuple[Part, ...] = PARTS
    samples: int = 16
    seed: int = 0
    dtype: DTypeName = "auto"
    threads: int | None = None


class _Question(NamedTuple):
    """A player's line that a persona is to answer, and the seed of the answer."""

    persona: Persona
    player: str
    seed: int


class _Trial(NamedTuple):
    """One sample of one test; `number` is the test's in its file, from 1."""

    persona: Persona
    number: int
    case: Case
    seed: int


class _Cast(NamedTuple):
    """Who is judged, and by what; everything that can be wrong with a file is found while this is made."""

    library: Library
    judged: list[Persona]
    authored: dict[str, Authored]  # of every persona
    asked: list[_Question]
    trials: list[_Trial]


class _Stage(NamedTuple):
    """What computes."""

    base: LoadedBase
    adapters: AdapterStore
    config: EngineConfig


def evaluate_personas(task: Task, on_progress: OnProgress) -> Evaluation:
    """Judge the personas. Raises `NpcError` for files, adapters and names that cannot be used."""
    torch.set_num_threads(task.threads or choose_threads())
    cast = _read_cast(task)
    matrix: LossMatrix | None = None
    lines: Lines | None = None
    tests: tuple[CaseResult, ...] = ()
    stage: _Stage | None = None
    if "matrix" in task.parts:
        stage = _open_stage(task, cast, on_progress, deterministic=False)
        matrix = _measure(stage, cast, on_progress)
    if cast.asked or cast.trials:
        on_cpu = choose_device(task.dtype).torch_device.type == "cpu"
        if stage is None or on_cpu:
            stage = None  # gives its memory back, before the same base is loaded for other kernels
            stage = _open_stage(task, cast, on_progress, deterministic=on_cpu)
        lines, tests = _speak(stage, cast, on_progress)
    if stage is None:
        raise InvalidError("There is nothing to evaluate.", "Write heldout.jsonl or tests.yaml.")
    return Evaluation(stage.base.info.name, stage.base.backend, matrix, lines, tests)


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, and `evaluation.png` if there is something to draw, into a folder that need not exist.

    Raises `StartupError` if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(evaluation.to_json() + "\n", encoding="utf-8")
        draw_evaluation(evaluation, folder / "evaluation.png")
    except OSError as error:
        raise StartupError(
            f"--out {folder} cannot be written ({error.strerror or error}).", "Name a folder."
        ) from error


def _open_stage(task: Task, cast: "_Cast", on_progress: OnProgress, *, deterministic: bool) -> "_Stage":
    """Load the base and all adapters. Raises what is wrong with the adapter of anybody who is judged."""
    base = load_base(task.base, task.dtype, on_progress, deterministic=deterministic)
    config = EngineConfig(kv_tokens=KV_TOKENS)
    adapters = make_store(base.decoder.shape, base.device, config, base.info.folder)
    load_adapters(adapters, cast.library, base.info.name)
    for persona in cast.judged:
        cast.library.find(persona.id)
    return _Stage(base, adapters, config)


def _read_cast(task: Task) -> _Cast:
    library = Library.load(task.personas)
    for problem in [] if task.only else library.problems.values():
        raise problem
    judged = [library.find(persona_id) for persona_id in dict.fromkeys(task.only)] if task.only else list(library)
    if not judged:
        raise InvalidError(f"{task.personas} holds no personas.", "Name a folder of persona folders.")
    authored = {persona.id: read_authored(persona) for persona in library}
    asked = _questions(judged, authored, task) if "lines" in task.parts else []
    trials = _trials(judged) if "tests" in task.parts else []
    return _Cast(library, judged, authored, asked, trials)


def _questions(judged: Sequence[Persona], authored: Mapping[str, Authored], task: Task) -> list[_Question]:
    """What each persona is asked, `samples` times: players' lines it was not trained on, in turns.

    A persona without held-out lines is asked those of all others.
    """
    everybodys = [exchange.player for own in authored.values() for exchange in own.heldout]
    asked = []
    for persona in judged:
        players = [exchange.player for exchange in authored[persona.id].heldout] or everybodys
        # Where it is asked fewer than there are, they are spread over all.
        step = max(len(players) // task.samples, 1)
        for number in range(task.samples if players else 0):
            player = players[number * step % len(players)]
            asked.append(_Question(persona, player, seed_of(task.seed, persona.id, number)))
    return asked


def _trials(judged: Sequence[Persona]) -> list[_Trial]:
    return [
        _Trial(persona, number, case, seed)
        for persona in judged
        for number, case in enumerate(read_cases(persona), 1)
        for seed in case.seeds
    ]


def _measure(stage: _Stage, cast: _Cast, on_progress: OnProgress) -> LossMatrix | None:
    """The matrix: all adapters, and the held-out replies of who is judged; None if there are none."""
    tokenizer = stage.base.tokenizer
    passages = {
        persona.id: [
            Passage(
                tokenizer.render(persona.messages(exchange.earlier, exchange.player)).token_ids,
                _encode(tokenizer, exchange.npc),
            )
            for exchange in cast.authored[persona.id].heldout
        ]
        for persona in cast.judged
        if cast.authored[persona.id].heldout
    }
    if not passages:
        return None
    rows = [None, *(persona.id for persona in cast.library if persona.adapter_name is not None)]
    return measure_losses(
        stage.base.decoder,
        stage.adapters,
        stage.config,
        passages,
        rows,
        on_progress=lambda fraction: on_progress("held-out losses", fraction),
    )


def _encode(tokenizer: ChatTokenizer, reply: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode_reply(reply))


def _speak(stage: _Stage, cast: _Cast, on_progress: OnProgress) -> tuple[Lines | None, tuple[CaseResult, ...]]:
    """Generated lines and tests, all of both as one batch."""
    cues = [Cue(persona, persona.messages([], player), seed) for persona, player, seed in cast.asked]
    cues += [Cue(trial.persona, trial.case.messages(trial.persona), trial.seed) for trial in cast.trials]
    label = f"{len(cues)} lines in one batch"
    replies = speak(*stage, cues, on_progress=lambda fraction: on_progress(label, fraction))
    inspectors = {persona.id: _inspector(persona, cast) for persona in cast.judged}
    num_asked = len(cast.asked)
    tests = tuple(
        CaseResult(persona.id, number, case.player, reply.text, seed, _failures(case, reply, inspectors[persona.id]))
        for (persona, number, case, seed), reply in zip(cast.trials, replies[num_asked:], strict=True)
    )
    return _judge_lines(cast, replies[:num_asked], inspectors) if cast.asked else None, tests


def _judge_lines(cast: _Cast, replies: Sequence[Reply], inspectors: Mapping[str, Inspector]) -> Lines:
    texts = {name: own.replies for name, own in cast.authored.items() if own.lines}
    classifier = Classifier(texts) if len(texts) > 1 else None
    lines = [
        SpokenLine(
            persona=persona.id,
            player=player,
            reply=reply.text,
            seed=seed,
            is_cut=reply.is_cut,
            findings=tuple(inspectors[persona.id].inspect(reply.text, is_cut=reply.is_cut)),
            attributed=classifier.attribute(reply.text) if classifier and persona.id in texts else None,
        )
        for (persona, player, seed), reply in zip(cast.asked, replies, strict=True)
    ]
    return Lines(tuple(lines), cross_validate(texts) if classifier else None)


def _inspector(persona: Persona, cast: _Cast) -> Inspector:
    return Inspector(persona, [exchange.npc for exchange in cast.authored[persona.id].lines])


def _failures(case: Case, reply: Reply, inspector: Inspector) -> tuple[str, ...]:
    return (reply.error,) if reply.error else tuple(find_failures(case, reply.text, inspector))
