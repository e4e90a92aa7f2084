"""One client connection as a state machine: frames and engine events in, effects out. No I/O, no clock, no torch.

The server performs the effects in order. What the connection's lines do is the dialogue's business; here are the
opening, the questions a client may ask, and what it is told unasked.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any, Literal

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.cast import Cast, Npc
from npc_runtime.dialogue import Dialogue, as_wire
from npc_runtime.door import Door
from npc_runtime.effects import (
    Close,
    Configure,
    Dropped,
    Effect,
    ManagePersona,
    Send,
    SendStatus,
    Shutdown,
    Stop,
    Submit,
    Supersede,
    Watch,
)
from npc_runtime.engine.core import Ended, Spoken, Started
from npc_runtime.errors import AuthError, InternalError, InvalidError, OverloadError, ProtocolError, WireError
from npc_runtime.line import error_info
from npc_runtime.prompt import Message
from npc_runtime.stage import Stage
from npc_runtime.warmup import Warmup, warmup_job

__all__ = ["Session", "clip_reason"]

logger = logging.getLogger(__name__)

MAX_CLOSE_REASON = 120  # bytes; a close frame has room for 123
MAX_MANAGED = 8  # questions about persona files that are under way


class Session:
    """The state of one connection, from `hello` to the end. Until there is a stage, the base is being loaded."""

    def __init__(self, *, subprotocol: str, door: Door, stage: Stage | None) -> None:
        self.name = ""  # which cast it has; the client resumes by it, so it is told to nobody else
        self.label = "-"  # the same for logs and for those who watch
        self.client = ""
        self.subprotocol = subprotocol
        self._door = door
        self._stage = stage
        self._state: Literal["opening", "waiting", "open", "closed"] = "opening"
        self._want = wire.Want()
        self._is_owner = False
        self._is_resumed = False
        self._cast = Cast()
        self._dialogue: Dialogue | None = None
        self._warming: dict[int, tuple[Warmup, str]] = {}  # by request: what it is for, and the persona
        self._num_managed = 0

    @property
    def is_open(self) -> bool:
        """Whether `welcome` was sent and nothing closed the session since."""
        return self._state == "open"

    @property
    def has_said_hello(self) -> bool:
        """Whether the client may be here; it may still be waiting for `welcome`."""
        return self._state in ("waiting", "open")

    @property
    def wants_stats(self) -> bool:
        """Whether `stats` are to be sent."""
        return self.is_open and self._want.stats

    @property
    def wake_at(self) -> float | None:
        """When `tick` wants to be called; None while nothing is due."""
        return None if self._dialogue is None else self._dialogue.wake_at

    def set_congested(self, is_congested: bool, now: float) -> None:
        """Whether the client keeps up with what it is sent."""
        if self._dialogue is not None:
            self._dialogue.set_congested(is_congested, now)

    def receive(self, frame: bytes | str, now: float) -> list[Effect]:
        """Take one frame from the client. A bad frame is answered; before `hello` it closes the connection."""
        if self._state == "closed":
            return []
        re = None
        try:
            document = codec.decode(frame, self.subprotocol)
            re = document["id"] if wire.is_id(document.get("id")) else None
            message = codec.parse_client(document)
            if self._state == "opening":
                return self._on_hello(message, now)
            return self._on_message(message, now)
        except WireError as error:
            if self._state == "opening":
                return self._close(wire.CloseCode.PROTOCOL, f"{error.message} {error.hint}", now)
            return self.fail(re, error)
        except Exception:  # a defect that one message met must not end the lines that are being spoken
            logger.exception("session=%s a message could not be handled", self.label)
            return self.fail(
                re, InternalError("The message could not be handled.", "The daemon's log has the details.")
            )

    # -- what the engine says --

    def on_started(self, event: Started) -> list[Effect]:
        """A line got its first forward pass."""
        return [] if self._dialogue is None else self._dialogue.on_started(event)

    def on_spoken(self, event: Spoken) -> None:
        """More text of a line; `after_step` or `tick` sends it."""
        if self._dialogue is not None:
            self._dialogue.on_spoken(event)

    def on_ended(self, event: Ended, now: float) -> list[Effect]:
        """A line is over, and perhaps its batch with it; or a persona is warm."""
        if event.request_id in self._warming:
            return self._on_warm(event)
        return [] if self._dialogue is None else self._dialogue.on_ended(event, now)

    def on_forward(self, batches: Iterable[wire.Id]) -> None:
        """One base forward pass served these batches."""
        if self._dialogue is not None:
            self._dialogue.on_forward(batches)

    def after_step(self, now: float) -> list[Effect]:
        """All events of a step are in."""
        return [] if self._dialogue is None else self._dialogue.after_step(now)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due at `wake_at`."""
        return [] if self._dialogue is None else self._dialogue.tick(now)

    # -- what the daemon says --

    def on_loading(self, label: str, progress: float) -> list[Effect]:
        """The base is being loaded."""
        event = wire.Event(kind="model.loading", progress=round(progress, 3), message=label)
        return [Send(event)] if self._state == "waiting" else []

    def on_loaded(self, stage: Stage) -> list[Effect]:
        """Lines can be spoken from here on."""
        self._stage = stage
        if self._state != "waiting":
            return []
        return [Send(wire.Event(kind="model.ready")), *self._open(stage)]

    def on_event(self, event: wire.Event) -> list[Effect]:
        """Something that concerns every connection."""
        return [Send(event)] if self.is_open else []

    def on_stats(self, stats: wire.Stats) -> list[Effect]:
        """How the daemon is, for a client that asked."""
        return [Send(stats)] if self.wants_stats else []

    def on_persona_changed(self, persona_id: str) -> list[Effect]:
        """A persona's files were saved."""
        if not self.is_open:
            return []
        return self.on_event(wire.Event(kind="persona.changed", persona=self._persona_info(persona_id)))

    def on_watched(self, other: "Session", message: wire.LineStart | wire.Delta | wire.LineEnd) -> list[Effect]:
        """A line of another connection did something; this client watches, or the server would not call."""
        watched = wire.Watched(session=other.label, client=other.client, message=message)
        if codec.frame_size(watched, self.subprotocol) > self._want.max_frame:
            return []
        return [Send(watched)]

    def refuse(self, reason: WireError, now: float) -> list[Effect]:
        """The daemon generates nothing more: what waits ends now, and what comes is rejected."""
        return [] if self._dialogue is None else self._dialogue.refuse(reason, now)

    def supersede(self, now: float) -> list[Effect]:
        """Another connection has resumed this one's cast."""
        return self._close(1000, "another connection resumed this session", now)

    def disconnect(self, now: float) -> list[Effect]:
        """The connection is gone: cancel whatever runs; nothing more is sent, and the NPCs wait for a `resume`."""
        running = (*(self._dialogue.request_ids if self._dialogue is not None else ()), *self._warming)
        dropped = self._dialogue.drop() if self._dialogue is not None else ()
        self._dialogue = None
        self._warming.clear()
        if self.has_said_hello:
            self._door.casts.leave(self.name, self, now, self._want.linger_s)
        self._state = "closed"
        return [*([Stop(running)] if running else []), *([Dropped(dropped)] if dropped else [])]

    def reply(self, re: wire.Id | None, body: dict[str, Any]) -> list[Effect]:
        """Answer a question, in parts if it is larger than the client's frames may be."""
        if not self.is_open:
            return []
        whole = wire.Reply(re=re, body=body)
        if codec.frame_size(whole, self.subprotocol) <= self._want.max_frame:
            return [Send(whole)]
        text = json.dumps(body, ensure_ascii=False)
        size = self._want.max_frame // 8  # a character takes at most 6 bytes, escaped
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        return [
            Send(wire.Reply(re=re, part=number, parts=len(pieces), data=piece)) for number, piece in enumerate(pieces)
        ]

    def fail(self, re: wire.Id | None, error: WireError) -> list[Effect]:
        """Answer that something went wrong."""
        if self._state == "closed":
            return []
        message = wire.Error(re=re, code=error.code, message=error.message, hint=error.hint, retryable=error.retryable)
        return [Send(message)]

    def on_managed(self, re: wire.Id | None, outcome: dict[str, Any] | WireError) -> list[Effect]:
        """What came of a `ManagePersona`."""
        self._num_managed -= 1
        return self.fail(re, outcome) if isinstance(outcome, WireError) else self.reply(re, outcome)

    # -- the opening --

    def _on_hello(self, message: wire.ClientMessage, now: float) -> list[Effect]:
        if not isinstance(message, wire.Hello):
            return self._close(wire.CloseCode.PROTOCOL, f"The first message must be hello, not {message.type}.", now)
        refusal = self._door.refusal(message)
        if refusal is not None:
            return self._close(*refusal, now)
        self._want = message.want
        self.client = message.client.name
        self._is_owner = self._door.owner_pid is not None and message.owner_pid == self._door.owner_pid
        self.name, self._cast, self._is_resumed, before = self._door.casts.arrive(self, message.resume, now)
        self.label = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        effects: list[Effect] = [] if before is None else [Supersede(before)]
        self._state = "waiting"
        if self._stage is None:
            return [*effects, *self.on_loading("loading", 0.0)]
        return [*effects, *self._open(self._stage)]

    def _open(self, stage: Stage) -> list[Effect]:
        self._state = "open"
        self._dialogue = Dialogue(stage, self._cast, name=self.label, subprotocol=self.subprotocol, want=self._want)
        return [Send(self._welcome(stage))]

    def _welcome(self, stage: Stage) -> wire.Welcome:
        info = stage.info
        welcome = wire.Welcome(
            session=self.name,
            protocol=wire.PROTOCOL_VERSION,
            version=info.version,
            device=info.device,
            backend=info.backend,
            base=info.base,
            caps=list(wire.CAPS),
            limits={**wire.LIMITS, "context": info.base.context},
            personas=[],
            resumed=self._is_resumed,
        )
        room = self._want.max_frame - codec.frame_size(welcome, self.subprotocol)
        fitting = []
        for persona in self._persona_infos():
            room -= codec.frame_size(persona, self.subprotocol) + 1
            if room < 0:
                break
            fitting.append(persona)
        return welcome.model_copy(update={"personas": fitting})

    # -- messages --

    def _on_message(self, message: wire.ClientMessage, now: float) -> list[Effect]:
        if isinstance(message, wire.Bye):
            return [*self.disconnect(now), Close(1000, "bye")]
        if isinstance(message, wire.Hello):
            raise ProtocolError("hello was already accepted.", "Send it once, first.")
        if self._dialogue is None or self._stage is None:
            raise OverloadError("The base model is still being loaded.", "Wait for welcome.")
        match message:
            case wire.Generate():
                return self._dialogue.generate(message, now, num_others=len(self._warming))
            case wire.Cancel():
                return self._dialogue.cancel(message, now)
            case wire.Warmup():
                return self._on_warmup(message, self._stage, self._dialogue, now)
            case wire.PersonaList():
                infos = [info.model_dump(mode="json", exclude_none=True) for info in self._persona_infos()]
                return self.reply(message.id, {"personas": infos})
            case wire.NpcOpen() | wire.NpcClose() | wire.NpcHistory() | wire.NpcSnapshot() | wire.NpcRestore():
                return self._on_npc(message, self._stage, self._dialogue, now)
        return self._ask_daemon(message)

    def _ask_daemon(self, message: wire.ClientMessage) -> list[Effect]:
        """What only the server can do."""
        match message:
            case wire.PersonaGet() | wire.PersonaPut() | wire.PersonaValidate() | wire.PersonaDelete():
                if self._num_managed >= MAX_MANAGED:
                    raise OverloadError(f"{MAX_MANAGED} questions about persona files are open.", "Wait for some.")
                self._num_managed += 1
                return [ManagePersona(message)]
            case wire.Config(id=re, max_tokens_per_s=max_tokens_per_s, paused=paused):
                return [Configure(re, max_tokens_per_s, paused)]
            case wire.Watch(id=re, on=on):
                return [Watch(on), *self.reply(re, {"on": on})]
            case wire.Status(id=re):
                return [SendStatus(re)]
            case wire.Shutdown(id=re):
                if not self._is_owner:
                    raise AuthError(
                        "Only the process that the daemon was started for may shut it down.",
                        "Start it with --owner-pid, and say hello with this owner_pid.",
                    )
                return [*self.reply(re, {}), Shutdown()]
        raise ProtocolError(f"{message.type} is not a question.", "PROTOCOL.md has the messages.")

    def _on_npc(
        self,
        message: wire.NpcOpen | wire.NpcClose | wire.NpcHistory | wire.NpcSnapshot | wire.NpcRestore,
        stage: Stage,
        dialogue: Dialogue,
        now: float,
    ) -> list[Effect]:
        cast, npc_id, re = self._cast, message.npc, message.id
        match message:
            case wire.NpcOpen():
                stage.library.find(message.persona)
                history = None if message.history is None else _turns(message.history)
                return self.reply(re, _describe(cast.open(npc_id, message.persona, message.vars, history)))
            case wire.NpcRestore():
                npc = cast.restore(npc_id, message.state)
                return [*dialogue.cancel_npc(npc_id, now), *self.reply(re, _describe(npc))]
            case wire.NpcClose():
                cast.close(npc_id)
                return [*dialogue.cancel_npc(npc_id, now), *self.reply(re, {"npc": npc_id})]
            case wire.NpcSnapshot():
                return self.reply(re, {"npc": npc_id, "state": cast.find(npc_id).snapshot()})
        return self.reply(re, {"npc": npc_id, "messages": _change_history(cast.find(npc_id), message)})

    def _on_warmup(self, message: wire.Warmup, stage: Stage, dialogue: Dialogue, now: float) -> list[Effect]:
        warmup = Warmup(message.id, message.personas)
        jobs = []
        for persona_id in warmup.personas:
            try:
                dialogue.check_room(len(self._warming))
                persona = stage.library.find(persona_id)
                job = warmup_job(persona, stage.render, request_id=stage.new_request_id(), now=now)
            except Exception as error:  # besides our own, whatever a base's chat template raises
                warmup.reject(persona_id, as_wire(error, self.label))
                continue
            self._warming[job.request_id] = warmup, persona_id
            jobs.append(job)
        return [Submit(tuple(jobs))] if jobs else self.reply(warmup.re, warmup.body)

    def _on_warm(self, event: Ended) -> list[Effect]:
        warmup, persona_id = self._warming.pop(event.request_id)
        warmup.finish(persona_id, event)
        return self.reply(warmup.re, warmup.body) if warmup.is_over else []

    def _persona_infos(self) -> list[wire.PersonaInfo]:
        assert self._stage is not None
        library = self._stage.library
        ids = {persona.id for persona in library} | library.problems.keys()
        return [self._persona_info(persona_id) for persona_id in sorted(ids)]

    def _persona_info(self, persona_id: str) -> wire.PersonaInfo:
        assert self._stage is not None
        library = self._stage.library
        adapter, problem = None, None
        try:
            adapter = library.find(persona_id).adapter_name
        except WireError as error:
            problem = error
        return wire.PersonaInfo(
            id=persona_id,
            display_name=library.name_of(persona_id),
            adapter=adapter,
            error=error_info(problem),
            stale=error_info(library.stale.get(persona_id)),
        )

    def _close(self, code: int, reason: str, now: float) -> list[Effect]:
        effects = self.disconnect(now)
        return [*effects, Close(code, clip_reason(reason))]


def clip_reason(reason: str) -> str:
    """As much of it as a close frame has room for."""
    return reason.encode()[:MAX_CLOSE_REASON].decode(errors="ignore")


def _turns(turns: Iterable[wire.ChatTurn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _describe(npc: Npc) -> dict[str, Any]:
    return {"npc": npc.id, "persona": npc.persona, "num_messages": len(npc.history)}


def _change_history(npc: Npc, message: wire.NpcHistory) -> list[Message]:
    """Do what was asked, and return what is answered."""
    takes_messages = message.op in ("set", "append")
    if takes_messages != (message.messages is not None):
        how = "needs 'messages'" if takes_messages else "takes no 'messages'"
        raise InvalidError(f"npc.history with op '{message.op}' {how}.", "PROTOCOL.md has its fields.")
    turns = _turns(message.messages or ())
    match message.op:
        case "pop":
            return npc.history.pop()
        case "set" | "clear":
            npc.history.set(turns)
        case "append":
            npc.history.append(turns)
    return list(npc.history.messages)
