"""Every PEFT variant as a row of one batch: the logits are PEFT's own, which wears each adapter alone."""

import copy
from functools import partial

import pytest
import torch
from driving import hold
from nemo import model_config, peft_tensors, random_lora, state_dict, write_nemo
from npc_kernels import cpu, cpu_exact, gpu, reference
from peft import PeftModel
from test_model import load, make_sequence
from tiny import make_adapter, make_model

from npc_runtime.adapter_import import Base, import_adapter
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.engine.weights import dense_weights
from npc_runtime.errors import AdapterIncompatible

VARIANTS = {
    "LoRA": {},
    "rank 24": {"rank": 24},
    "rank 64": {"rank": 64},
    "rank 128": {"rank": 128},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 12},
    "DoRA": {"use_dora": True},
    "DoRA, attention only": {"use_dora": True, "rank": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "DoRA scaled as rsLoRA": {"use_dora": True, "use_rslora": True, "rank": 20, "lora_alpha": 9},
    "patterns": {
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 20},
        "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 50, "up_proj": 1},
    },
    "DoRA with patterns": {"use_dora": True, "rank_pattern": {"k_proj": 17}, "alpha_pattern": {r".*\.2\..*": 40}},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "two layers": {"layers_to_transform": [0, 2]},
    "by an expression": {"target_modules": r".*\.(0|1)\.(self_attn|mlp)\.(k_proj|up_proj|down_proj)"},
    "all linears": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "another start": {"init_lora_weights": "orthogonal"},
}

ON_GPU = ["rank 24", "DoRA", "DoRA, attention only"]
"""The interpreter of its kernels takes seconds for each; what differs on the way to them is in these."""


class Cast:
    """A tiny base with biases, and all variants of adapters for it."""

    def __init__(self, tmp):
        self.folder, self.tmp = tmp / "model", tmp
        self.model = make_model("llama-untied-bias", self.folder)
        self.adapters = {
            name: make_adapter(copy.deepcopy(self.model), tmp / name, seed=seed, std=0.2, **options)
            for seed, (name, options) in enumerate(VARIANTS.items())
        }
        for folder in self.adapters.values():
            stir_magnitudes(folder)

    def oracle(self, name):
        """PEFT's logits behind each of its prompts."""
        model = copy.deepcopy(self.model)
        if name is not None:
            model = PeftModel.from_pretrained(model, str(self.adapters[name])).eval()
        with torch.no_grad():
            return model(torch.tensor([prompt_of(name)])).logits[0, -2:].float()


def stir_magnitudes(folder):
    """DoRA begins with the base's norms, so that forgetting a factor of one would not be seen."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "magnitude" in name:
            tensor.mul_(torch.rand_like(tensor) + 0.5)
    save_file(tensors, path, metadata={"format": "pt"})


def prompt_of(name):
    """Of different lengths, and the same for every kernel module."""
    seed = list(VARIANTS).index(name) if name is not None else 77
    return torch.randint(3, 97, (5 + seed % 7,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def cast(tmp_path_factory):
    return Cast(tmp_path_factory.mktemp("variants"))


def make_store(cast, decoder, **options):
    options = {"max_pages": 64, "max_rank": 128, "base": partial(dense_weights, cast.folder), **options}
    return AdapterStore(decoder.shape, decoder.layout, dtype=decoder.dtype, device=decoder.device, **options)


@pytest.mark.parametrize("kernels", [reference, cpu, cpu_exact, gpu])
def test_every_variant_in_a_mixed_batch_equals_peft(cast, kernels):
    decoder = load(cast.folder, kernels)
    store = make_store(cast, decoder)
    names = ON_GPU if kernels is gpu else list(cast.adapters)
    for name in names:
        store.add(name, [(cast.adapters[name], 1.0)])
    got = mixed_logits(decoder, store, {name: prompt_of(name) for name in [*names, None]})
    for name, logits in got.items():
        expected = cast.oracle(name)
        torch.testing.assert_close(
            logits, expected, atol=3e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def mixed_logits(decoder, store, prompts):
    """The logits of each row's last two tokens: the prompts in one step, and one more token for all in the next."""
    runner = Runner(decoder, store, EngineConfig(block_size=4, kv_tokens=80 * 4 * 20))
    rows = {}
    for number, (name, prompt) in enumerate(prompts.items()):
        rows[name] = make_sequence(prompt[:-1], 20 * number)
        object.__setattr__(rows[name].request, "adapter", name)
        if name is not None:
            hold(store, name)
    store.open()
    first = runner.forward([PlannedRow(row, 0, row.num_tokens) for row in rows.values()])
    for name, row in rows.items():
        row.output_ids.append(prompts[name][-1])
    last = runner.forward([PlannedRow(row, row.num_tokens - 1, row.num_tokens) for row in rows.values()])
    return {name: torch.stack(pair) for name, *pair in zip(rows, first, last, strict=True)}


def test_factors_follow_their_adapters_through_few_pages(cast):
    """A LoRA takes the pages that a DoRA had, whose copies are gone, and the other way round."""
    decoder = load(cast.folder)
    names = ["DoRA", "LoRA", "DoRA, attention only", "DoRA", "LoRA"]
    store = make_store(cast, decoder, max_pages=1, max_host_bytes=0)
    for name in dict.fromkeys(names):
        store.add(name, [(cast.adapters[name], 1.0)])
    runner = Runner(decoder, store, EngineConfig(block_size=4, kv_tokens=800))
    for name in names:
        row = make_sequence(prompt_of(name), 0)
        object.__setattr__(row.request, "adapter", name)
        user = hold(store, name)
        got = runner.forward([PlannedRow(row, 0, row.num_tokens)])
        torch.testing.assert_close(got[0], cast.oracle(name)[-1], atol=3e-4, rtol=1e-4)
        store.leave(user)


def test_a_scaled_dora_is_what_peft_makes_of_it(cast):
    """PEFT scales the scaling; its norm follows."""
    decoder = load(cast.folder)
    store = make_store(cast, decoder)
    store.add("DoRA", [(cast.adapters["DoRA"], 0.3)])
    got = mixed_logits(decoder, store, {"DoRA": prompt_of("DoRA")})["DoRA"]
    model = PeftModel.from_pretrained(copy.deepcopy(cast.model), str(cast.adapters["DoRA"])).eval()
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    with torch.no_grad():
        expected = model(torch.tensor([prompt_of("DoRA")])).logits[0, -2:]
    torch.testing.assert_close(got, expected, atol=3e-4, rtol=1e-4)


def test_a_dora_among_several_is_refused(cast):
    store = make_store(cast, load(cast.folder))
    with pytest.raises(AdapterIncompatible, match="DoRA"):
        store.add("both", [(cast.adapters["LoRA"], 1.0), (cast.adapters["DoRA"], 1.0)])


def test_a_store_without_a_base_refuses_a_dora(cast):
    store = make_store(cast, load(cast.folder), base=None)
    with pytest.raises(AdapterIncompatible, match="weights of the base"):
        store.add("DoRA", [(cast.adapters["DoRA"], 1.0)])


def test_the_pool_counts_the_factors(cast):
    decoder = load(cast.folder)
    page, factors = decoder.layout.num_elements * 4, decoder.layout.num_outputs * 4
    store = make_store(cast, decoder, max_pool_bytes=2 * page)
    store.add("LoRA", [(cast.adapters["LoRA"], 1.0)])
    assert store.num_bytes == page
    store.add("DoRA", [(cast.adapters["DoRA"], 1.0)])
    assert store.num_bytes == page + factors, "two pages with factors are more than was allowed"
    store.open()
    assert (store.pool.nbytes, store.multipliers.nbytes) == (page, factors)


@pytest.mark.parametrize("variant", ["nemo", "canonical"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_imported_nemo_adapter_equals_its_tensors_in_peft(cast, variant, mode, tmp_path):
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = cast.model.config
    lora = random_lora(config, rank=12)
    path = write_nemo(
        tmp_path / "guard.nemo",
        model_config(config, rank=12, alpha=30),
        state_dict(lora, config, variant=variant),
        mode=mode,
    )
    import_adapter(path, tmp_path / "imported", Base.of("tiny", cast.folder), max_rank=64)
    by_hand = tmp_path / "by hand"
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    LoraConfig(r=12, lora_alpha=30, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(by_hand)
    save_file(peft_tensors(lora), by_hand / "adapter_model.safetensors", metadata={"format": "pt"})
    decoder = load(cast.folder)
    store = make_store(cast, decoder)
    store.add("imported", [(tmp_path / "imported", 1.0)])
    store.add("by hand", [(by_hand, 1.0)])
    prompt = prompt_of("rank 64")
    got = mixed_logits(decoder, store, {"imported": prompt, "by hand": prompt, None: prompt})
    assert torch.equal(got["imported"], got["by hand"])
    assert (got["imported"] - got[None]).abs().max() > 0.1
    with torch.no_grad():
        model = PeftModel.from_pretrained(copy.deepcopy(cast.model), str(tmp_path / "imported")).eval()
        expected = model(torch.tensor([prompt])).logits[0, -2:]
    torch.testing.assert_close(got["imported"], expected, atol=3e-4, rtol=1e-4)
