"""The live lines and batches of one connection, from `generate` to the last end. No I/O, no clock, no torch.

Lines of different NPCs go to the engine together. Lines of one NPC take turns: the first goes to the engine, the others
are held here until it is over, so that each finds in the history what came before it. What is held ends here too, by
its deadline or a cancel, without having cost a token.

Every accepted line ends exactly once, every batch too.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.cast import Cast
from npc_runtime.effects import Effect, Send, Stop, Submit
from npc_runtime.engine.core import Ended, EndReason, Spoken, Started
from npc_runtime.errors import InternalError, InvalidError, OverloadError, UnsupportedError, WireError
from npc_runtime.line import Line, line_end, line_start
from npc_runtime.prepare import prepare_line, write_prompt
from npc_runtime.stage import Stage
from npc_runtime.turns import Turns

__all__ = ["Dialogue", "as_wire"]

logger = logging.getLogger(__name__)

UNHEARD_S = 5.0
"""A client that has not kept up for so long loses its lines; what they would say is not computed for nobody."""


@dataclass(slots=True)
class _Batch:
    """A batch with live lines."""

    arrival: float
    live: set[wire.Id] = field(default_factory=set)
    num_ok: int = 0
    num_failed: int = 0
    num_forwards: int = 0


class Dialogue:
    """All that is being said to one client, and all that waits for its turn."""

    def __init__(self, stage: Stage, cast: Cast, *, name: str, subprotocol: str, want: wire.Want) -> None:
        self._stage = stage
        self._cast = cast
        self._name = name
        self._subprotocol = subprotocol
        self._want = want
        self._lines: dict[wire.Id, Line] = {}
        self._by_request: dict[int, wire.Id] = {}
        self._batches: dict[wire.Id, _Batch] = {}
        self._turns = Turns()
        self._next_tick: float | None = None
        self._congested_at: float | None = None
        self._refusal: WireError | None = None

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def request_ids(self) -> list[int]:
        """The lines in the engine."""
        return [line.job.request_id for line in self._lines.values() if not self._turns.is_held(line)]

    @property
    def wake_at(self) -> float | None:
        """When `tick` wants to be called: for text that waits, for a client that does not read, for a deadline."""
        times = [_deadline(line) for line in self._turns.held]
        times.append(self._next_tick if self._congested_at is None else None)
        if self._congested_at is not None and self._lines:
            times.append(self._congested_at + UNHEARD_S)
        return min((time for time in times if time is not None), default=None)

    def set_congested(self, is_congested: bool, now: float) -> None:
        """Whether the client keeps up; while it does not, deltas wait and merge."""
        if not is_congested:
            self._congested_at = None
        elif self._congested_at is None:
            self._congested_at = now

    def generate(self, message: wire.Generate, now: float, *, num_others: int) -> list[Effect]:
        """Accept a batch, line by line, as far as there is room beside `num_others`."""
        if message.mode == "turns":
            raise UnsupportedError("mode 'turns' is not served yet.", "Use 'independent'.")
        if message.batch in self._batches:
            raise InvalidError(f"batch {message.batch!r} is still running.", "Give every batch its own id.")
        batch = _Batch(arrival=now)
        items, jobs = [], []
        for document in message.lines:
            try:
                line = self._take(document, message.batch, now, num_others)
            except Exception as error:  # besides our own, whatever a base's chat template raises
                batch.num_failed += 1
                items.append(_rejected(document, as_wire(error, self._name)))
                continue
            self._lines[line.request.line] = line
            self._by_request[line.job.request_id] = line.request.line
            batch.live.add(line.request.line)
            if not self._turns.is_held(line):
                jobs.append(line.job)
            items.append(wire.AcceptedItem(line=line.request.line, status="queued", message=line.note))
        accepted = self._fit(wire.Accepted(batch=message.batch, re=message.id, items=items))
        if not batch.live:
            return [Send(accepted), Send(_batch_end(message.batch, batch, now))]
        self._batches[message.batch] = batch
        return [Send(accepted), *([Submit(tuple(jobs))] if jobs else [])]

    def cancel(self, message: wire.Cancel, now: float) -> list[Effect]:
        """End lines early; what is in the engine ends when that says so."""
        selectors = (message.lines is not None, message.batch is not None, message.npc is not None, message.all)
        if sum(selectors) != 1:
            raise InvalidError("cancel needs exactly one of lines, batch, npc, all.", "Name what to cancel.")
        if message.npc is not None:
            return self.cancel_npc(message.npc, now)
        chosen: Collection[wire.Id] = list(self._lines) if message.all else message.lines or ()
        if message.batch is not None and message.batch in self._batches:
            chosen = list(self._batches[message.batch].live)
        return self._cancel([self._lines[line] for line in dict.fromkeys(chosen) if line in self._lines], now)

    def cancel_npc(self, npc_id: str, now: float) -> list[Effect]:
        """End all lines of an NPC."""
        return self._cancel(self._turns.of(npc_id), now)

    def on_started(self, event: Started) -> list[Effect]:
        """A line got its first forward pass."""
        line = self._line_of(event.request_id)
        return [] if line is None else [Send(line_start(line, event))]

    def on_spoken(self, event: Spoken) -> None:
        """More text of a line; it is sent by `after_step` if it is the line's first, else by `tick`."""
        line = self._line_of(event.request_id)
        if line is not None:
            line.has_spoken |= line.request.stream
            line.pending += event.text if line.request.stream else ""

    def on_ended(self, event: Ended, now: float) -> list[Effect]:
        """A line is over in the engine."""
        line = self._line_of(event.request_id)
        if line is None:
            return []
        if line.is_unheard and event.reason == EndReason.CANCELLED:
            event = replace(event, reason=EndReason.OVERLOAD, error=_unheard())
        effects = self._finish(line, event, now)
        return effects if line.npc is None else [*effects, *self._next_turn(line.npc.id, now)]

    def on_forward(self, batches: Iterable[wire.Id]) -> None:
        """One base forward pass served these batches."""
        for batch_id in batches:
            if batch_id in self._batches:
                self._batches[batch_id].num_forwards += 1

    def after_step(self, now: float) -> list[Effect]:
        """All events of a step are in: a line's first text goes out at once, the rest waits for the tick."""
        effects: list[Effect] = []
        if self._congested_at is None:
            effects = self._flush([line for line in self._lines.values() if line.seq == 0])
        if not any(line.pending for line in self._lines.values()):
            self._next_tick = None
        elif self._next_tick is None:
            self._next_tick = now + self._want.tick_ms / 1000
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Do what is due: send the deltas that wait, end what is held too long, give up a client that does not read."""
        effects: list[Effect] = []
        if self._congested_at is None and self._next_tick is not None and now >= self._next_tick:
            self._next_tick = None
            effects += self._flush(self._lines.values())
        late = [line for line in self._turns.held if (_deadline(line) or now + 1) <= now]
        effects += self._end_held(late, EndReason.DEADLINE, now)
        if self._congested_at is not None and now >= self._congested_at + UNHEARD_S:
            effects += self._give_up(now)
        return effects

    def refuse(self, reason: WireError, now: float) -> list[Effect]:
        """Nothing more is generated: what is held ends, and what comes is rejected; the engine ends the rest."""
        self._refusal = reason
        return self._end_held(self._turns.held, EndReason.CANCELLED, now)

    def drop(self) -> tuple[str | None, ...]:
        """Forget everything; nobody is left to be told. Returns whose lines those were."""
        personas = tuple(_persona_of(line) for line in self._lines.values())
        for known in (self._lines, self._by_request, self._batches):
            known.clear()
        self._turns.clear()
        return personas

    def check_room(self, num_others: int) -> None:
        """Raise `OverloadError` if nothing more can be taken; `num_others` count beside the lines."""
        if self._refusal is not None:
            raise type(self._refusal)(self._refusal.message, self._refusal.hint)
        if len(self._lines) + num_others >= wire.LIMITS["lines"]:
            raise OverloadError(f"{wire.LIMITS['lines']} lines are running on this connection.", "Wait for some.")

    def _take(self, document: Any, batch: wire.Id, now: float, num_others: int) -> Line:
        request = codec.parse_line(document)
        if request.line in self._lines:
            raise InvalidError(f"line {request.line!r} is still running.", "Give every line its own id.")
        self.check_room(num_others)
        line = prepare_line(request, batch, now, stage=self._stage, cast=self._cast, turns=self._turns)
        self._turns.join(line)
        return line

    def _next_turn(self, npc_id: str, now: float) -> list[Effect]:
        """A line of the NPC is over: let the next one go to the engine."""
        effects: list[Effect] = []
        for line in self._turns.of(npc_id):
            try:
                write_prompt(line, self._stage)
                return [*effects, Submit((line.job,))]
            except Exception as error:  # its persona's template may fail with what the NPC remembers now
                event = _unstarted(line, EndReason.ERROR, now, as_wire(error, self._name))
                effects += self._finish(line, event, now)
        return effects

    def _cancel(self, lines: Sequence[Line], now: float) -> list[Effect]:
        held = [line for line in lines if self._turns.is_held(line)]
        ids = tuple(line.job.request_id for line in lines if line not in held)
        return [*([Stop(ids)] if ids else []), *self._end_held(held, EndReason.CANCELLED, now)]

    def _end_held(self, lines: Iterable[Line], reason: EndReason, now: float) -> list[Effect]:
        effects: list[Effect] = []
        error = {EndReason.DEADLINE: None, EndReason.OVERLOAD: _unheard()}.get(reason)
        for line in lines:
            effects += self._finish(line, _unstarted(line, reason, now, error), now)
        return effects

    def _give_up(self, now: float) -> list[Effect]:
        """The client does not read: end all its lines, what is in the engine as soon as that lets go."""
        self._congested_at = now
        held = self._turns.held
        running = [line for line in self._lines.values() if line not in held and not line.is_unheard]
        for line in running:
            line.is_unheard = True
        if not running and not held:
            return []
        logger.warning("%s has not read for %.0f s: %d lines end", self._name, UNHEARD_S, len(running) + len(held))
        ids = tuple(line.job.request_id for line in running)
        return [*([Stop(ids)] if ids else []), *self._end_held(held, EndReason.OVERLOAD, now)]

    def _finish(self, line: Line, event: Ended, now: float) -> list[Effect]:
        """Say that a line is over, and its batch if it was the last; what it said joins its NPC's history."""
        effects = self._flush([line])
        line_id, batch = line.request.line, self._batches[line.batch]
        del self._lines[line_id], self._by_request[line.job.request_id]
        self._turns.leave(line)
        is_ok = event.reason in (EndReason.STOP, EndReason.LENGTH)
        if is_ok:
            _remember(line, event.text)
        batch.live.discard(line_id)
        batch.num_ok += is_ok
        batch.num_failed += not is_ok
        message = line_end(line, event)
        self._log(line, message)
        effects.append(Send(message, _persona_of(line)))
        if event.reason == EndReason.OVERLOAD:
            said = event.error.message if event.error else "A line could not be taken."
            effects.append(Send(wire.Event(kind="overload", message=said)))
        if not batch.live:
            del self._batches[line.batch]
            effects.append(Send(_batch_end(line.batch, batch, now)))
        return effects

    def _log(self, line: Line, end: wire.LineEnd) -> None:
        logger.info(
            "line session=%s line=%r persona=%s npc=%r reason=%s%s prompt=%d cached=%d tokens=%d "
            "queue_ms=%.0f ttft_ms=%s total_ms=%.0f",
            *(self._name, end.line, line.persona.id, line.request.npc, end.reason),
            f"({end.error.code})" if end.error else "",
            *(end.usage.prompt, end.usage.cached, end.usage.completion),
            end.timing.queue_ms,
            "-" if end.timing.ttft_ms is None else round(end.timing.ttft_ms),
            end.timing.total_ms,
        )

    def _fit(self, accepted: wire.Accepted) -> wire.Accepted:
        """Shorten what is said about rejected lines until the frame is small enough; the codes always stay."""
        for shorter in ({"hint": None}, {"hint": None, "message": None}):
            if codec.frame_size(accepted, self._subprotocol) <= self._want.max_frame:
                break
            items = [item.model_copy(update=shorter) for item in accepted.items]
            accepted = accepted.model_copy(update={"items": items})
        return accepted

    def _flush(self, lines: Iterable[Line]) -> list[Effect]:
        """Put the waiting text of these lines into as few frames as their size allows."""
        frames: list[list[wire.DeltaItem]] = [[]]
        room = self._want.max_frame
        for line in lines:
            if not line.pending:
                continue
            size = 6 * len(line.pending) + 512  # the worst escape, and the map around it
            if size > room and frames[-1]:
                frames.append([])
                room = self._want.max_frame
            room -= size
            frames[-1].append(wire.DeltaItem(line=line.request.line, seq=line.seq, text=line.pending))
            line.seq, line.pending = line.seq + 1, ""
        return [Send(wire.Delta(items=items)) for items in frames if items]

    def _line_of(self, request_id: int) -> Line | None:
        line_id = self._by_request.get(request_id)
        return None if line_id is None else self._lines[line_id]


def as_wire(error: Exception, session_name: str) -> WireError:
    """What a client is told of an error; the log has the rest of an unexpected one."""
    if isinstance(error, WireError):
        return error
    logger.error("a line of %s could not be prepared", session_name, exc_info=error)
    return InternalError("The line could not be prepared.", "The daemon's log has the details.")


def _remember(line: Line, reply: str) -> None:
    """Let the NPC remember what was said, unless its history was changed by hand since the line was sent."""
    npc = line.npc
    if npc is None or line.request.history == "none" or not reply:
        return
    if npc.history.epoch == line.epoch:
        npc.history.remember(line.said, reply)


def _persona_of(line: Line) -> str | None:
    """Whose line it is; a draft's name is the client's, and no persona of the daemon's."""
    return line.persona.id if line.request.draft is None else None


def _unstarted(line: Line, reason: EndReason, now: float, error: WireError | None) -> Ended:
    """The end of a line that the engine never saw."""
    waited = 1000 * (now - line.job.arrival)
    return Ended(
        line.job.request_id,
        reason,
        num_prompt=len(line.job.prompt_ids),
        queue_ms=waited,
        total_ms=waited,
        error=error,
    )


def _deadline(line: Line) -> float | None:
    return None if line.job.deadline_ms is None else line.job.arrival + line.job.deadline_ms / 1000


def _unheard() -> OverloadError:
    return OverloadError(f"The client did not read for {UNHEARD_S:.0f} s.", "Read faster, or ask for fewer lines.")


def _rejected(document: Any, error: WireError) -> wire.AcceptedItem:
    line = document.get("line") if isinstance(document, dict) else None
    return wire.AcceptedItem(
        line=line if wire.is_id(line) else None,
        status="rejected",
        code=error.code,
        message=error.message,
        hint=error.hint,
        retryable=error.retryable or None,
    )


def _batch_end(batch_id: wire.Id, batch: _Batch, now: float) -> wire.BatchEnd:
    return wire.BatchEnd(
        batch=batch_id,
        ok=batch.num_ok,
        failed=batch.num_failed,
        wall_ms=round(1000 * (now - batch.arrival), 3),
        forwards=batch.num_forwards,
    )
