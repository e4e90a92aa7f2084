"""Every persona, in one mixed batch with all the others, says what transformers + PEFT say for it alone.

The oracle runs each row alone, teacher-forced on our tokens: that its own choice is our token at every
position is the same as greedy decoding giving the same text, at the price of one forward.
"""

import copy

import pytest
import torch
from driving import greedy, hold, make_engine, make_store, speak
from peft import PeftModel
from tiny import make_adapter
from transformers import AutoModelForCausalLM

from npc_runtime.engine.core import EngineConfig, Sequence
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.loading import LoadedBase, load_base
from npc_runtime.persona import Library, shipped_personas

NUM_TOKENS = 48
RANKS = (4, 16, 24, 64)
TEXT = "The king is dead! What will you do now?"


class Cast:
    """All rows of the mixed batch: name -> (prompt ids, adapter folder or None)."""

    def __init__(self, tokenizer, oracle, tmp):
        self.rows = {}
        for persona in Library.load(shipped_personas()):
            folder = persona.folder / persona.adapter[0].path if persona.adapter else None
            self.rows[persona.id] = (tokenizer.render(persona.messages([], TEXT)).token_ids, folder)
        prompt = self.rows["odo"][0]
        for rank in RANKS:
            folder = make_adapter(copy.deepcopy(oracle), tmp / f"rank{rank}", rank=rank, seed=rank, std=0.06)
            self.rows[f"rank{rank}"] = (prompt, folder)
        self.rows["base"] = (prompt, None)

    def store(self, base):
        store = make_store(base.decoder)
        for name, (_, folder) in self.rows.items():
            if folder is not None:
                store.add(name, [(folder, 1.0)])
        return store

    def adapter_of(self, name):
        return name if self.rows[name][1] is not None else None


@pytest.fixture(scope="module")
def oracle(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def cast(float_base, oracle, tmp_path_factory):
    return Cast(float_base.tokenizer, oracle, tmp_path_factory.mktemp("ranks"))


def run_greedy(cast, base, store):
    engine, run = make_engine(base, store)
    requests = [
        greedy(number, prompt, cast.adapter_of(name), max_tokens=NUM_TOKENS)
        for number, (name, (prompt, _)) in enumerate(cast.rows.items(), 1)
    ]
    speak(engine, run, requests)
    return {name: run.tokens[number] for number, name in enumerate(cast.rows, 1)}


@pytest.fixture(scope="module")
def spoken(cast, float_base):
    return run_greedy(cast, float_base, cast.store(float_base))


def with_adapter(model, folder, dtype=torch.float32):
    """The oracle wearing one adapter (None: as it is); the caller's model is not changed."""
    model = copy.deepcopy(model).to(dtype)
    if folder is None:
        return model
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).to(dtype).eval()


@torch.no_grad()
def oracle_logits(model, prompt, tokens):
    """Logits that chose each of `tokens` after `prompt`."""
    ids = torch.tensor([[*prompt, *tokens]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


def choices(logits, eos_ids):
    logits = logits.clone()
    logits[:, list(eos_ids)] = -torch.inf  # min_tokens holds the end back on both sides
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", [*sorted(p.id for p in Library.load(shipped_personas())), "base"])
def test_greedy_tokens_equal_peft_alone(name, cast, spoken, oracle, float_base):
    prompt, folder = cast.rows[name]
    assert len(spoken[name]) == NUM_TOKENS
    logits = oracle_logits(with_adapter(oracle, folder), prompt, spoken[name])
    assert choices(logits, float_base.tokenizer.eos_ids) == spoken[name]


@pytest.mark.parametrize("rank", RANKS)
def test_greedy_tokens_equal_peft_for_other_ranks(rank, cast, spoken, oracle, float_base):
    name = f"rank{rank}"
    prompt, folder = cast.rows[name]
    logits = oracle_logits(with_adapter(oracle, folder), prompt, spoken[name])
    assert choices(logits, float_base.tokenizer.eos_ids) == spoken[name]
    assert spoken[name] != spoken["base"], "the adapter changes nothing, so the test would prove nothing"


def test_rows_of_one_prompt_differ_by_their_adapter_alone(spoken):
    same_prompt = [spoken[f"rank{rank}"] for rank in RANKS] + [spoken["base"], spoken["odo"]]
    assert len({tuple(tokens) for tokens in same_prompt}) == len(same_prompt)


def test_a_neighbours_adapter_would_be_noticed(cast, float_base, spoken):
    """Break the index on purpose: with two personas' pages swapped, both must say something else."""
    store = cast.store(float_base)
    swapped = {"thalindra": "brom", "brom": "thalindra"}
    right = store.pages_of
    store.pages_of = lambda name: right(swapped.get(name, name))
    wrong = run_greedy(cast, float_base, store)
    assert wrong["thalindra"] != spoken["thalindra"]
    assert wrong["brom"] != spoken["brom"]
    assert wrong["odo"] == spoken["odo"]


def test_bfloat16_is_as_close_as_transformers_own(cast, spoken, oracle):
    """Max logit difference to float32, over the prompt's end and 8 decoded tokens, in one mixed batch."""
    base = load_base("smollm2-135m", "bfloat16", lambda label, fraction: None)
    ours = teacher_forced(cast, base, {name: tokens[:8] for name, tokens in spoken.items()})
    for name, (prompt, folder) in cast.rows.items():
        tokens = spoken[name][:9]
        exact = oracle_logits(with_adapter(oracle, folder), prompt, tokens)
        theirs = oracle_logits(with_adapter(oracle, folder, torch.bfloat16), prompt, tokens)
        allowed = 2 * (theirs - exact).abs().max()
        assert (ours[name] - exact).abs().max() <= allowed, name


def teacher_forced(cast, base: LoadedBase, tokens):
    """Our logits after the prompt and after each given token, all rows in every step."""
    config = EngineConfig(kv_tokens=4096)
    store = cast.store(base)
    runner = Runner(base.decoder, store, config)
    sequences, free = {}, iter(range(config.num_blocks))
    for number, (name, (prompt, _)) in enumerate(cast.rows.items()):
        sequences[name] = Sequence(greedy(number, prompt, cast.adapter_of(name)))
        sequences[name].blocks = [next(free) for _ in range(-(-(len(prompt) + 9) // config.block_size))]
        if cast.adapter_of(name):
            hold(store, name)
    steps = [runner.forward([PlannedRow(s, 0, s.num_tokens) for s in sequences.values()])]
    for position in range(8):
        for name, sequence in sequences.items():
            sequence.output_ids.append(tokens[name][position])
        steps.append(runner.forward([PlannedRow(s, s.num_tokens - 1, s.num_tokens) for s in sequences.values()]))
    return {name: torch.stack([step[row] for step in steps]) for row, name in enumerate(sequences)}
