"""One example of every message; `generate.py` writes them to golden/ and PROTOCOL.md, all languages read them."""

from npc_runtime import protocol as wire
from npc_runtime.prompt import Context

BASE = wire.BaseModelInfo(name="smollm2-135m", sha256="ab" * 32, context=8192)
USAGE = wire.Usage(prompt=57, cached=0, completion=21)
TIMING = wire.Timing(queue_ms=1.5, ttft_ms=120.25, total_ms=900.0, tokens_per_s=23.5, batch_avg=4.75)

CLIENT = [
    wire.Hello(
        id=1,
        protocol=1,
        token="s3cret",
        client=wire.ClientInfo(name="tavern", version="1.0", engine="Unity 2022.3"),
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
            {"line": "l2", "persona": "vaskar", "input": {"text": "Þú! “Naïve” 你好 🜁"}},
        ],
    ),
    wire.Cancel(id=3, lines=[1, "l2"]),
    wire.PersonaList(id=4),
    wire.Warmup(id=7, personas=["odo", "vaskar"]),
    wire.Status(id=5),
    wire.Bye(id=6),
]

SERVER = [
    wire.Welcome(
        session="s1",
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
        ],
    ),
    wire.LineStart(line=1, persona="odo", adapter="odo", seed=7, queue_ms=1.5, batch_size=5),
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
    wire.Error(re=3, code="invalid", message="'sampling.temperature' is invalid.", hint="PROTOCOL.md has the bounds."),
]
