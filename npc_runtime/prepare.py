"""From what a client asks for to a line that the engine can speak: who, with what settings, after what was said."""

import hashlib
from dataclasses import replace

from npc_runtime import protocol as wire
from npc_runtime.cast import Cast, Npc
from npc_runtime.draft import read_draft
from npc_runtime.errors import ContextOverflow, InvalidError
from npc_runtime.line import Job, Line, line_prompt, resolve_sampling
from npc_runtime.persona import Library, Persona
from npc_runtime.prompt import fit_prompt
from npc_runtime.stage import Stage
from npc_runtime.turns import Turns

__all__ = ["prepare_line", "write_prompt"]


def prepare_line(
    request: wire.LineRequest, batch: wire.Id, now: float, *, stage: Stage, cast: Cast, turns: Turns
) -> Line:
    """Resolve everything that a line leaves to its persona or npc. Raises `WireError` if it cannot be spoken, and
    whatever a base's chat template raises.
    """
    persona, npc = _find_speaker(request, stage.library, cast)
    job = Job(
        request_id=stage.new_request_id(),
        batch=batch,
        arrival=now,
        adapter=persona.adapter_name,
        prompt_ids=(),
        sampling=resolve_sampling(request.sampling, persona, stage.new_seed),
        soft_words=persona.limits.soft_words,
        priority=request.priority,
        deadline_ms=request.deadline_ms,
    )
    epoch = npc.history.epoch if npc is not None else 0
    line = Line(request=request, batch=batch, job=job, persona=persona, npc=npc, epoch=epoch)
    is_held = npc is not None and bool(turns.of(npc.id))
    write_prompt(line, stage, with_history=not is_held)  # of one that is held, whether it fits at all
    return line


def write_prompt(line: Line, stage: Stage, *, with_history: bool = True) -> None:
    """Make the line's prompt, its npc's history being what it is now. Raises as `prepare_line`."""
    npc, max_tokens = line.npc, line.job.sampling.max_tokens or 0
    context = stage.info.base.context
    prompt = line_prompt(
        line.request,
        line.persona,
        earlier=npc.history.messages if npc is not None and with_history else (),
        facts=npc.vars if npc is not None else {},
    )
    expected = npc.num_dropped if npc is not None else 0
    fitted = fit_prompt(prompt, stage.render, context - max_tokens, expected=expected)
    if npc is not None and with_history:
        npc.num_dropped = fitted.num_dropped
    prompt_ids = fitted.token_ids
    if not prompt_ids:
        raise InvalidError("The base's tokenizer makes nothing of this text.", "Send other words.")
    if len(prompt_ids) > context - max_tokens:
        raise ContextOverflow(
            f"The prompt has {len(prompt_ids)} tokens and the reply may have {max_tokens}; the context holds "
            f"{context}.",
            "Shorten the text, the context or the persona, or lower max_tokens.",
        )
    line.job = replace(line.job, prompt_ids=prompt_ids, asked=(line.persona.id, prompt.said))
    line.prompt_hash = hashlib.sha256(",".join(map(str, prompt_ids)).encode()).hexdigest()[:16]
    line.said, line.note = prompt.said, fitted.left_out


def _find_speaker(request: wire.LineRequest, library: Library, cast: Cast) -> tuple[Persona, Npc | None]:
    named = [name for name in ("npc", "persona", "draft") if getattr(request, name) is not None]
    if len(named) != 1:
        has = f"{' and '.join(named)}" if named else "none"
        raise InvalidError(f"A line needs exactly one of npc, persona, draft; it has {has}.", "Name who speaks.")
    if request.npc is not None:
        npc = cast.find(request.npc)
        return library.find(npc.persona), npc
    if request.persona is not None:
        return library.find(request.persona), None
    return read_draft(request.draft, library), None
