"""One client connection as a state machine: frames and engine events in, effects out. No I/O, no clock, no torch.

The server performs the effects in order. Every accepted line ends exactly once, every batch too.
"""

import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.effects import Close, Effect, Send, SendStatus, Stop, Submit
from npc_runtime.errors import (
    ContextOverflow,
    InternalError,
    InvalidError,
    OverloadError,
    ProtocolError,
    UnsupportedError,
    WireError,
)
from npc_runtime.line import Job, Line, Renderer, error_info, line_end, line_prompt, line_start, resolve_sampling
from npc_runtime.persona import Library
from npc_runtime.prompt import fit_prompt
from npc_runtime.warmup import Warmup, warmup_job

if TYPE_CHECKING:
    from npc_runtime.engine.core import Ended, Spoken, Started

__all__ = ["DaemonInfo", "Session"]

logger = logging.getLogger(__name__)

MAX_CLOSE_REASON = 120  # bytes; a close frame has room for 123


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """What `welcome` says about the daemon; the same for every connection."""

    version: str
    device: str
    backend: str
    base: wire.BaseModelInfo
    token: str | None  # None: --no-auth


@dataclass(slots=True)
class _Batch:
    """A batch with live lines."""

    arrival: float
    live: set[wire.Id] = field(default_factory=set)
    num_ok: int = 0
    num_failed: int = 0
    num_forwards: int = 0


class Session:
    """The state of one connection, from `hello` to the end.

    `is_congested` is set by the server while the client does not keep up: deltas then wait and merge.
    """

    def __init__(
        self,
        *,
        name: str,
        subprotocol: str,
        info: DaemonInfo,
        library: Library,
        render: Renderer,
        new_request_id: Callable[[], int],
        new_seed: Callable[[], int],
    ) -> None:
        self.name = name
        self.subprotocol = subprotocol
        self.is_congested = False
        self._info = info
        self._library = library
        self._render = render
        self._new_request_id = new_request_id
        self._new_seed = new_seed
        self._state: Literal["opening", "open", "closed"] = "opening"
        self._want = wire.Want()
        self._lines: dict[wire.Id, Line] = {}
        self._by_request: dict[int, wire.Id] = {}
        self._batches: dict[wire.Id, _Batch] = {}
        self._warming: dict[int, tuple[Warmup, str]] = {}  # by request: what it is for, and the persona
        self._next_tick: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether `hello` was accepted and nothing closed the session since."""
        return self._state == "open"

    @property
    def next_tick(self) -> float | None:
        """When `tick` wants to be called; None while no delta waits."""
        return self._next_tick

    def receive(self, frame: bytes | str, now: float) -> list[Effect]:
        """Take one frame from the client. A bad frame is answered; before `hello` it closes the connection."""
        if self._state == "closed":
            return []
        re = None
        try:
            document = codec.decode(frame, self.subprotocol)
            re = _echo(document.get("id"))
            message = codec.parse_client(document)
            if self._state == "opening":
                return self._on_hello(message)
            return self._on_message(message, now)
        except WireError as error:
            if self._state == "opening":
                return self._close(wire.CloseCode.PROTOCOL, f"{error.message} {error.hint}")
            return [Send(wire.Error(re=re, code=error.code, message=error.message, hint=error.hint))]

    def on_started(self, event: "Started") -> list[Effect]:
        """A line got its first forward pass."""
        line = self._line_of(event.request_id)
        return [] if line is None else [Send(line_start(line, event))]

    def on_spoken(self, event: "Spoken") -> list[Effect]:
        """More text of a line; it is sent by `after_step` if it is the line's first, else by `tick`."""
        line = self._line_of(event.request_id)
        if line is not None:
            line.has_spoken |= line.request.stream
            line.pending += event.text if line.request.stream else ""
        return []

    def on_ended(self, event: "Ended", now: float) -> list[Effect]:
        """A line is over, and perhaps its batch with it; or a persona is warm."""
        if event.request_id in self._warming:
            return self._on_warm(event)
        line = self._line_of(event.request_id)
        if line is None:
            return []
        line_id, batch = line.request.line, self._batches[line.batch]
        effects = self._flush([line])
        del self._lines[line_id], self._by_request[event.request_id]
        batch.live.discard(line_id)
        is_ok = event.reason in ("stop", "length")
        batch.num_ok += is_ok
        batch.num_failed += not is_ok
        effects.append(Send(line_end(line, event), line.persona.id))
        if not batch.live:
            del self._batches[line.batch]
            effects.append(Send(_batch_end(line.batch, batch, now)))
        return effects

    def on_forward(self, batches: Iterable[wire.Id]) -> None:
        """One base forward pass served these batches."""
        for batch_id in batches:
            if batch_id in self._batches:
                self._batches[batch_id].num_forwards += 1

    def after_step(self, now: float) -> list[Effect]:
        """All events of a step are in: a line's first text goes out at once, the rest waits for the tick."""
        effects: list[Effect] = []
        if not self.is_congested:
            effects = self._flush([line for line in self._lines.values() if line.seq == 0])
        if not any(line.pending for line in self._lines.values()):
            self._next_tick = None
        elif self._next_tick is None:
            self._next_tick = now + self._want.tick_ms / 1000
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Send all deltas that wait, unless it is too early or the client does not keep up."""
        if self._next_tick is None or now < self._next_tick or self.is_congested:
            return []
        self._next_tick = None
        return self._flush(self._lines.values())

    def announce(self, persona_id: str) -> list[Effect]:
        """A persona's files were saved; nobody asked."""
        if not self.is_open:
            return []
        return [Send(wire.Event(kind="persona.changed", persona=self._persona_info(persona_id)))]

    def disconnect(self) -> list[Effect]:
        """The connection is gone: cancel whatever runs; nothing more is sent."""
        self._state = "closed"
        running = (*self._by_request, *self._warming)
        dropped = tuple(line.persona.id for line in self._lines.values())
        self._warming.clear()
        self._lines.clear()
        self._by_request.clear()
        self._batches.clear()
        return [Stop(running, dropped)] if running else []

    def reply(self, re: wire.Id | None, body: dict[str, Any]) -> list[Effect]:
        """Answer a question, in parts if it is larger than the client's frames may be."""
        whole = wire.Reply(re=re, body=body)
        if codec.frame_size(whole, self.subprotocol) <= self._want.max_frame:
            return [Send(whole)]
        text = json.dumps(body, ensure_ascii=False)
        size = self._want.max_frame // 8  # a character takes at most 6 bytes, escaped
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        return [
            Send(wire.Reply(re=re, part=number, parts=len(pieces), data=piece)) for number, piece in enumerate(pieces)
        ]

    def _on_hello(self, message: wire.ClientMessage) -> list[Effect]:
        if not isinstance(message, wire.Hello):
            return self._close(wire.CloseCode.PROTOCOL, f"The first message must be hello, not {message.type}.")
        if message.protocol != wire.PROTOCOL_VERSION:
            return self._close(
                wire.CloseCode.PROTOCOL,
                f"This daemon speaks protocol {wire.PROTOCOL_VERSION}, not {message.protocol}.",
            )
        expected = self._info.token
        if expected is not None and not hmac.compare_digest((message.token or "").encode(), expected.encode()):
            what = "The token is wrong." if message.token else "hello has no token."
            return self._close(wire.CloseCode.AUTH, f"{what} It is in the daemon's first line and runtime file.")
        self._state = "open"
        self._want = message.want
        return [Send(self._welcome())]

    def _welcome(self) -> wire.Welcome:
        welcome = wire.Welcome(
            session=self.name,
            protocol=wire.PROTOCOL_VERSION,
            version=self._info.version,
            device=self._info.device,
            backend=self._info.backend,
            base=self._info.base,
            caps=list(wire.CAPS),
            limits={**wire.LIMITS, "context": self._info.base.context},
            personas=[],
        )
        room = self._want.max_frame - codec.frame_size(welcome, self.subprotocol)
        fitting = []
        for persona in self._persona_infos():
            room -= codec.frame_size(persona, self.subprotocol) + 1
            if room < 0:
                break
            fitting.append(persona)
        return welcome.model_copy(update={"personas": fitting})

    def _on_message(self, message: wire.ClientMessage, now: float) -> list[Effect]:
        match message:
            case wire.Generate():
                return self._on_generate(message, now)
            case wire.Cancel():
                return self._on_cancel(message)
            case wire.PersonaList():
                infos = [info.model_dump(mode="json", exclude_none=True) for info in self._persona_infos()]
                return self.reply(message.id, {"personas": infos})
            case wire.Warmup():
                return self._on_warmup(message, now)
            case wire.Status():
                return [SendStatus(message.id)]
            case wire.Bye():
                return [*self.disconnect(), Close(1000, "bye")]
        raise ProtocolError("hello was already accepted.", "Send it once, first.")

    def _on_cancel(self, message: wire.Cancel) -> list[Effect]:
        if message.npc is not None:
            raise UnsupportedError("Cancelling by npc is not served yet.", "Cancel lines, a batch, or all.")
        if (message.lines is not None) + (message.batch is not None) + message.all != 1:
            raise InvalidError("cancel needs exactly one of lines, batch, all.", "Name what to cancel.")
        chosen = self._lines.keys() if message.all else set(message.lines or ())
        if message.batch is not None and message.batch in self._batches:
            chosen = self._batches[message.batch].live
        ids = tuple(self._lines[line].job.request_id for line in chosen if line in self._lines)
        return [Stop(ids)] if ids else []

    def _on_generate(self, message: wire.Generate, now: float) -> list[Effect]:
        if message.mode == "turns":
            raise UnsupportedError("mode 'turns' is not served yet.", "Use 'independent'.")
        if message.batch in self._batches:
            raise InvalidError(f"batch {message.batch!r} is still running.", "Give every batch its own id.")
        batch = _Batch(arrival=now)
        items, jobs = [], []
        for document in message.lines:
            try:
                line = self._prepare(document, message.batch, now)
            except Exception as error:  # besides our own, whatever a base's chat template raises
                batch.num_failed += 1
                items.append(_rejected(document, self._as_wire(error)))
                continue
            self._lines[line.request.line] = line
            self._by_request[line.job.request_id] = line.request.line
            batch.live.add(line.request.line)
            jobs.append(line.job)
            items.append(wire.AcceptedItem(line=line.request.line, status="queued", message=line.note))
        effects: list[Effect] = [Send(self._fit(wire.Accepted(batch=message.batch, re=message.id, items=items)))]
        if jobs:
            self._batches[message.batch] = batch
            return [*effects, Submit(tuple(jobs))]
        return [*effects, Send(_batch_end(message.batch, batch, now))]

    def _prepare(self, document: Any, batch: wire.Id, now: float) -> Line:
        """Check one line and resolve everything it leaves to the persona."""
        request = codec.parse_line(document)
        if request.line in self._lines:
            raise InvalidError(f"line {request.line!r} is still running.", "Give every line its own id.")
        self._check_room()
        if request.persona is None:
            raise InvalidError("'persona' is missing.", "Name the persona that speaks.")
        persona = self._library.find(request.persona)
        sampling = resolve_sampling(request.sampling, persona, self._new_seed)
        room = self._info.base.context - (sampling.max_tokens or 0)
        fitted = fit_prompt(line_prompt(request, persona, {}), self._render, room)
        prompt_ids = fitted.token_ids
        if not prompt_ids:
            raise InvalidError("The base's tokenizer makes nothing of this text.", "Send other words.")
        if len(prompt_ids) > room:
            raise ContextOverflow(
                f"The prompt has {len(prompt_ids)} tokens and the reply may have {sampling.max_tokens}; the context "
                f"holds {self._info.base.context}.",
                "Shorten the text, the context or the persona, or lower max_tokens.",
            )
        job = Job(
            request_id=self._new_request_id(),
            batch=batch,
            arrival=now,
            adapter=persona.adapter_name,
            prompt_ids=prompt_ids,
            sampling=sampling,
            soft_words=persona.limits.soft_words,
            priority=request.priority,
            deadline_ms=request.deadline_ms,
        )
        digest = hashlib.sha256(",".join(map(str, prompt_ids)).encode()).hexdigest()[:16]
        return Line(request=request, batch=batch, job=job, persona=persona, prompt_hash=digest, note=fitted.left_out)

    def _on_warmup(self, message: wire.Warmup, now: float) -> list[Effect]:
        warmup = Warmup(message.id, message.personas)
        jobs = []
        for persona_id in warmup.personas:
            try:
                self._check_room()
                persona = self._library.find(persona_id)
                job = warmup_job(persona, self._render, request_id=self._new_request_id(), now=now)
            except Exception as error:  # besides our own, whatever a base's chat template raises
                warmup.reject(persona_id, self._as_wire(error))
                continue
            self._warming[job.request_id] = warmup, persona_id
            jobs.append(job)
        return [Submit(tuple(jobs))] if jobs else self.reply(warmup.re, warmup.body)

    def _on_warm(self, event: "Ended") -> list[Effect]:
        warmup, persona_id = self._warming.pop(event.request_id)
        warmup.finish(persona_id, event)
        return self.reply(warmup.re, warmup.body) if warmup.is_over else []

    def _check_room(self) -> None:
        if len(self._lines) + len(self._warming) >= wire.LIMITS["lines"]:
            raise OverloadError(f"{wire.LIMITS['lines']} lines are running on this connection.", "Wait for some.")

    def _as_wire(self, error: Exception) -> WireError:
        if isinstance(error, WireError):
            return error
        logger.error("a line of %s could not be prepared", self.name, exc_info=error)
        return InternalError("The line could not be prepared.", "The daemon's log has the details.")

    def _fit(self, accepted: wire.Accepted) -> wire.Accepted:
        """Shorten what is said about rejected lines until the frame is small enough; the codes always stay."""
        for shorter in ({"hint": None}, {"hint": None, "message": None}):
            if codec.frame_size(accepted, self.subprotocol) <= self._want.max_frame:
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

    def _persona_infos(self) -> list[wire.PersonaInfo]:
        ids = {persona.id for persona in self._library} | self._library.problems.keys()
        return [self._persona_info(persona_id) for persona_id in sorted(ids)]

    def _persona_info(self, persona_id: str) -> wire.PersonaInfo:
        adapter, problem = None, None
        try:
            adapter = self._library.find(persona_id).adapter_name
        except WireError as error:
            problem = error
        return wire.PersonaInfo(
            id=persona_id,
            display_name=self._library.name_of(persona_id),
            adapter=adapter,
            error=error_info(problem),
            stale=error_info(self._library.stale.get(persona_id)),
        )

    def _close(self, code: int, reason: str) -> list[Effect]:
        effects = self.disconnect()
        return [*effects, Close(code, reason.encode()[:MAX_CLOSE_REASON].decode(errors="ignore"))]


def _echo(value: Any) -> wire.Id | None:
    """A client's id if it is a valid one, for echoing."""
    return value if wire.is_id(value) else None


def _rejected(document: Any, error: WireError) -> wire.AcceptedItem:
    line = document.get("line") if isinstance(document, dict) else None
    return wire.AcceptedItem(
        line=_echo(line), status="rejected", code=error.code, message=error.message, hint=error.hint
    )


def _batch_end(batch_id: wire.Id, batch: _Batch, now: float) -> wire.BatchEnd:
    return wire.BatchEnd(
        batch=batch_id,
        ok=batch.num_ok,
        failed=batch.num_failed,
        wall_ms=round(1000 * (now - batch.arrival), 3),
        forwards=batch.num_forwards,
    )
