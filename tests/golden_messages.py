"""One example of every message; `generate.py` writes them to golden/ and PROTOCOL.md, all languages read them."""

from npc_runtime import protocol as wire
from npc_runtime.prompt import Context

BASE = wire.BaseModelInfo(name="smollm2-135m", sha256="ab" * 32, context=8192)
USAGE = wire.Usage(prompt=57, cached=0, completion=21)
TIMING = wire.Timing(queue_ms=1.5, ttft_ms=120.25, total_ms=900.0, tokens_per_s=23.5, batch_avg=4.75)
TURN = wire.ChatTurn(role="user", content="Who goes there?")
STATE = '{"npc":1,"persona":"vaskar","vars":{"day":3},"messages":[["user","Þú?"],["assistant","Hm."]]}'
DOC = {"schema": 1, "id": "odo", "display_name": "Odo", "bio": "An innkeeper."}

CLIENT = [
    wire.Hello(
        id=1,
        protocol=1,
        token="s3cret",
        client=wire.ClientInfo(name="tavern", version="1.0", engine="Unity 2022.3"),
        project="tavern",
        owner_pid=4711,
        resume="0123456789abcdef",
        want=wire.Want(stats=True),
    ),
    wire.Generate(
        id=2,
        batch="b1",
        lines=[
            wire.LineRequest(
                line=1,
                persona="odo",
                input=wire.Input(speaker="Mira", text="The king is dead!"),
                context=Context(facts=("The bells are ringing.",), scene="The Crooked Lantern, at night"),
                sampling=wire.LineSampling(temperature=0.5, seed=7, max_tokens=48, stop=["\n"]),
                deadline_ms=2000.0,
            ).model_dump(mode="json", exclude_none=True),
            {"line": "l2", "npc": "guard_2", "input": {"text": "Þú! “Naïve” 你好 🜁"}},
        ],
    ),
    wire.Cancel(id=3, lines=[1, "l2"]),
    wire.NpcOpen(
        id=8,
        npc="guard_2",
        persona="vaskar",
        vars={"king": "dead", "day": 3, "gate_open": False, "trust": 0.25},
        history=[TURN, wire.ChatTurn(role="assistant", content="Move along.")],
    ),
    wire.NpcHistory(id=9, npc="guard_2", op="append", messages=[TURN]),
    wire.NpcSnapshot(id=10, npc="guard_2"),
    wire.NpcRestore(id=11, npc="guard_2", state=STATE),
    wire.NpcClose(id="c12", npc="guard_2"),
    wire.PersonaList(id=4),
    wire.PersonaGet(id=13, persona="odo"),
    wire.PersonaPut(id=14, persona="odo", doc=DOC, etag="0123456789abcdef"),
    wire.PersonaValidate(id=15, persona="odo", doc={**DOC, "bio": 7}),
    wire.PersonaDelete(id=16, persona="odo"),
    wire.Warmup(id=7, personas=["odo", "vaskar"]),
    wire.Watch(id=17, on=True),
    wire.Config(id=18, max_tokens_per_s=60.0, paused=False),
    wire.Status(id=5),
    wire.Shutdown(id=19),
    wire.Bye(id=6),
]

SERVER = [
    wire.Welcome(
        session="0123456789abcdef",
        protocol=1,
        version="0.1.0",
        device="cpu, 2 threads",
        backend="torch, reference kernels, bfloat16",
        base=BASE,
        caps=list(wire.CAPS),
        limits={**wire.LIMITS, "context": 8192},
        personas=[
            wire.PersonaInfo(id="odo", display_name="Odo", adapter="odo"),
            wire.PersonaInfo(
                id="marta",
                display_name="Marta",
                error=wire.ErrorInfo(code="adapter_missing", message="It is gone.", hint="Copy it."),
            ),
        ],
    ),
    wire.Accepted(
        batch="b1",
        re=2,
        items=[
            wire.AcceptedItem(line=1, status="queued"),
            wire.AcceptedItem(
                line="l2",
                status="rejected",
                code="persona_unknown",
                message="There is no persona 'vaskar'.",
                hint="Loaded are: odo.",
            ),
            wire.AcceptedItem(
                line=3,
                status="rejected",
                code="overload",
                message="256 lines are running on this connection.",
                hint="Wait for some.",
                retryable=True,
            ),
        ],
    ),
    wire.LineStart(line=1, npc="odo_1", persona="odo", adapter="odo", seed=7, queue_ms=1.5, batch_size=5),
    wire.Delta(items=[wire.DeltaItem(line=1, seq=0, text="Oh dear, “dead”? 🜁")]),
    wire.LineEnd(
        line=1,
        reason="stop",
        text="Oh dear, “dead”? 🜁",
        usage=USAGE,
        timing=TIMING,
        seed=7,
        prompt_hash="0123456789abcdef",
    ),
    wire.BatchEnd(batch="b1", ok=1, failed=1, wall_ms=910.5, forwards=22),
    wire.Reply(re=4, body={"personas": [{"id": "odo", "display_name": "Odo", "adapter": "odo"}]}),
    wire.Event(
        kind="persona.changed",
        persona=wire.PersonaInfo(
            id="odo",
            display_name="Odo",
            adapter="odo",
            stale=wire.ErrorInfo(code="persona_invalid", message="bio is missing.", hint="Write one."),
        ),
    ),
    wire.Stats(
        active=5,
        queued=0,
        tokens_per_s=118.5,
        tokens=4711,
        forwards=902,
        kv_used=0.125,
        kv_cached=0.5,
        preempted=0,
        adapters=["odo", "vaskar"],
        personas=5,
        connections=1,
        memory={"process": 611.5},
        max_tokens_per_s=60.0,
        uptime_s=12.5,
    ),
    wire.Watched(
        session="fedcba9876543210",
        client="tavern",
        message=wire.Delta(items=[wire.DeltaItem(line=1, seq=0, text="Oh dear")]),
    ),
    wire.Error(re=3, code="invalid", message="'sampling.temperature' is invalid.", hint="PROTOCOL.md has the bounds."),
]
