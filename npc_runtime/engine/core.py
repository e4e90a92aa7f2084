"""The data that flows through the engine: requests, sequences, events and the configuration. No torch."""

from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Literal, Protocol

from npc_runtime.errors import WireError

__all__ = [
    "AdapterEvicted",
    "AdapterLoaded",
    "Admission",
    "Degraded",
    "EndReason",
    "Ended",
    "EngineConfig",
    "EngineStats",
    "Event",
    "LineEngine",
    "MemoryBytes",
    "News",
    "Request",
    "SamplingParams",
    "SeenTokens",
    "Sequence",
    "Spoken",
    "Started",
    "StepOutput",
]


class EndReason(StrEnum):
    """Why a line ended; the words of `line.end.reason`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    OVERLOAD = "overload"
    ERROR = "error"


class Admission(Enum):
    """Whether a line's adapter is on the device."""

    ADMITTED = "admitted"  # it is, and stays until the line leaves
    LOADING = "loading"  # it will be, and then stays until the line was admitted or has left
    NO_ROOM = "no room"  # all pages are kept for others; ask again


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the engine. `kv_tokens` bounds prompt + reply of all running lines together."""

    block_size: int = 16
    kv_tokens: int = 16_384
    max_rows: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 1_024
    max_adapter_pages: int = 64
    max_adapter_rank: int = 64  # the kernels go to 128
    spare_adapter_pages: int = 2  # for adapters that are new or replaced while the old ones still speak
    adapter_pool_bytes: int = 2 << 30  # pages on the device
    adapter_host_bytes: int = 2 << 30  # copies in main memory
    ageing_s: float = 2.0  # waiting so long raises a line by one priority

    @property
    def num_blocks(self) -> int:
        """KV blocks in the cache."""
        return self.kv_tokens // self.block_size


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one line is sampled and where it ends; every value is already resolved and valid."""

    seed: int
    max_tokens: int
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    trim: Literal["none", "sentence"] = "none"
    soft_words: int = 0  # with trim "sentence": a line ends at the first sentence end after so many words


@dataclass(frozen=True, slots=True)
class Request:
    """One line to generate. `id` is unique in the engine; `group` is what the client sent together.

    Lines of one priority take turns by `client`: whoever sends many does not keep the others waiting. A warmup computes
    its prompt into the prefix cache, has its adapter pinned, and ends without a token.
    """

    id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival: float  # seconds, the engine's clock
    adapter: str | None = None  # name in the adapter store
    cache_key: str = ""  # the adapter's content; equal prefixes are shared only under the same key
    group: Hashable = None
    client: Hashable = None  # whose line it is: a connection
    asked: tuple[str, str] | None = None  # the persona and the player's words; engines that compute do not look at it
    priority: int = 5
    deadline: float | None = None  # seconds, the engine's clock
    is_warmup: bool = False


@dataclass(slots=True, eq=False)
class SeenTokens:
    """The different tokens of a line, kept from step to step: what a repetition penalty is for."""

    ids: "array[int]" = field(default_factory=lambda: array("q"))
    known: set[int] = field(default_factory=set)  # the same
    num_tokens: int = 0  # of the line, that were looked at

    def add(self, tokens: list[int]) -> None:
        """Take the tokens that the line has got since."""
        self.num_tokens += len(tokens)
        for token in tokens:
            if token not in self.known:
                self.known.add(token)
                self.ids.append(token)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request while the engine works on it."""

    request: Request
    came_at: int = 0  # the scheduler's count of what has come and gone
    blocks: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    is_promised: bool = False  # its adapter is being loaded, or is loaded and kept, for it
    block_keys: list[bytes] = field(default_factory=list)  # of the full blocks, as far as they were asked for
    num_cached: int = 0  # prompt tokens that came from the prefix cache
    num_computed: int = 0  # tokens whose keys and values are in the cache
    started_at: float | None = None
    first_text_at: float | None = None
    num_steps: int = 0
    sum_rows: int = 0  # rows of all its steps, for the average batch size
    _seen: SeenTokens = field(default_factory=SeenTokens)

    @property
    def num_tokens(self) -> int:
        """Prompt and reply so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def speaks(self) -> bool:
        """Whether only the last sampled token is left to compute."""
        return bool(self.output_ids) and self.num_tokens - self.num_computed == 1

    @property
    def max_tokens(self) -> int:
        """The most KV slots this line can ever need; the last sampled token is never fed back."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens - 1

    @property
    def seen_ids(self) -> "array[int]":
        """The tokens of prompt and reply, each once."""
        if self._seen.num_tokens < self.num_tokens:
            self._seen.add(self.tokens(self._seen.num_tokens, self.num_tokens))
        return self._seen.ids

    def use_adapter(self, name: str, cache_key: str) -> None:
        """Compute it with another adapter from the start; it holds no blocks and no adapter."""
        assert not self.blocks
        self.request = replace(self.request, adapter=name, cache_key=cache_key)
        self.block_keys = []
        self.is_promised = False

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids `[start, stop)` of prompt and reply."""
        num_prompt = len(self.request.prompt_ids)
        prompt = self.request.prompt_ids[start:stop]
        return [*prompt, *self.output_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]]


@dataclass(frozen=True, slots=True)
class Started:
    """The line got its first forward pass."""

    request_id: int
    queue_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Spoken:
    """More text of a line; whole characters."""

    request_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The line is over; nothing about it follows. `text` is the authority over what was spoken.

    `num_cached` is how much of the prompt came from the prefix cache; of a warmup, how much of it is there now.
    """

    request_id: int
    reason: EndReason
    text: str = ""
    num_prompt: int = 0
    num_cached: int = 0
    num_completion: int = 0
    queue_ms: float = 0.0
    first_text_ms: float | None = None
    total_ms: float = 0.0
    tokens_per_s: float = 0.0
    batch_avg: float = 0.0
    error: WireError | None = None


Event = Started | Spoken | Ended


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """An adapter came to the device; by the name that lines ask for, whatever version of it."""

    name: str


@dataclass(frozen=True, slots=True)
class AdapterEvicted:
    """An adapter made room for another; the next line that wants it waits for a load."""

    name: str


@dataclass(frozen=True, slots=True)
class Degraded:
    """The engine goes on, but something happened that whoever runs it should know."""

    message: str


News = AdapterLoaded | AdapterEvicted | Degraded
"""What is nobody's line. Rare: an adapter that came or went, a device that failed and recovered."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought: its events, the groups that its one base forward served (none: no forward), and news."""

    events: tuple[Event, ...]
    groups: frozenset[Hashable] = frozenset()
    news: tuple[News, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryBytes:
    """What the engine holds. On a CPU all of it is main memory, on a GPU all but the copies is the GPU's."""

    kv_cache: int = 0
    adapter_pool: int = 0  # pages on the device, used or not
    adapter_copies: int = 0  # of adapters, in main memory
    gpu: int | None = None  # that torch has taken for everything, the base included; None: there is no GPU


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for `status`."""

    num_running: int
    num_waiting: int
    num_forwards: int
    num_tokens: int  # generated since start
    tokens_per_s: float  # generated, over the last seconds of work
    kv_blocks_used: int
    kv_blocks_total: int
    kv_blocks_cached: int  # holding a known prefix, in use or not
    num_preempted: int  # since start
    adapters_resident: tuple[str, ...]
    paused: bool = False
    max_tokens_per_s: float | None = None
    memory: MemoryBytes = MemoryBytes()


class LineEngine(Protocol):
    """What speaks lines: the engine, or a recording that is played in its place."""

    @property
    def has_died(self) -> bool:
        """Whether nothing is generated any more, though nobody closed it."""
        ...

    def start(self) -> None:
        """Begin."""
        ...

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue lines that belong together."""
        ...

    def cancel(self, ids: Iterable[int]) -> None:
        """End these lines; ids that are over already are ignored."""
        ...

    def configure(self, *, max_tokens_per_s: float | None, paused: bool) -> None:
        """Keep to a pace, or stand still."""
        ...

    def replace_adapter(
        self, name: str, parts: Iterable[tuple[Path, float]], on_done: Callable[[WireError | None], None]
    ) -> None:
        """Put new files of an adapter in use, for lines that have not begun."""
        ...

    def close(self, timeout_s: float) -> None:
        """End every line as cancelled, and stop."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""
        ...
