"""The house's shape: imports go down the layers, public lists are true, light modules stay light."""

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import only from modules above it. README.md draws the same tree.
LAYERS = [
    "npc_kernels.batch",
    "npc_kernels.reference",
    "npc_kernels.cpu_gemm",
    "npc_kernels.openmp",
    "npc_kernels.cpu_jit",
    "npc_kernels.cpu_tape",
    "npc_kernels.cpu_rows",
    "npc_kernels.cpu_attend",
    "npc_kernels.cpu_codes",
    "npc_kernels.cpu_draw",
    "npc_kernels.cpu",
    "npc_kernels.cpu_exact",
    "npc_kernels.gpu_plan",
    "npc_kernels.quant",
    "npc_kernels.lora",
    "npc_kernels.gemm",
    "npc_kernels.fused",
    "npc_kernels.attention",
    "npc_kernels.sampling",
    "npc_kernels.gpu",
    "npc_kernels.gpu_check",
    "npc_runtime",
    "npc_runtime.errors",
    "npc_runtime.stopping",
    "npc_runtime.owner",
    "npc_runtime.logs",
    "npc_runtime.whole_file",
    "npc_runtime.condition",
    "npc_runtime.document",
    "npc_runtime.document_change",
    "npc_runtime.schema",
    "npc_runtime.problems",
    "npc_runtime.prompt",
    "npc_runtime.persona",
    "npc_runtime.wire_document",
    "npc_runtime.draft",
    "npc_runtime.persona_folder",
    "npc_runtime.card_text",
    "npc_runtime.lorebook",
    "npc_runtime.cards",
    "npc_runtime.card_writer",
    "npc_runtime.png",
    "npc_runtime.card_files",
    "npc_runtime.card_folder",
    "npc_runtime.history",
    "npc_runtime.cast",
    "npc_runtime.wire_parts",
    "npc_runtime.wire_client",
    "npc_runtime.wire_server",
    "npc_runtime.protocol",
    "npc_runtime.codec",
    "npc_runtime.engine",
    "npc_runtime.engine.core",
    "npc_runtime.line",
    "npc_runtime.stage",
    "npc_runtime.turns",
    "npc_runtime.prepare",
    "npc_runtime.warmup",
    "npc_runtime.effects",
    "npc_runtime.door",
    "npc_runtime.dialogue",
    "npc_runtime.session",
    "npc_runtime.project_lock",
    "npc_runtime.discovery",
    "npc_runtime.engine.blocks",
    "npc_runtime.engine.books",
    "npc_runtime.engine.commands",
    "npc_runtime.engine.pages",
    "npc_runtime.engine.scheduler",
    "npc_runtime.engine.pace",
    "npc_runtime.engine.watchdog",
    "npc_runtime.engine.markers",
    "npc_runtime.engine.tokenizer",
    "npc_runtime.engine.ending",
    "npc_runtime.engine.speech",
    "npc_runtime.engine.device",
    "npc_runtime.engine.faults",
    "npc_runtime.engine.embedded",
    "npc_runtime.engine.base_folder",
    "npc_runtime.engine.hub_process",
    "npc_runtime.engine.hub",
    "npc_runtime.engine.bases",
    "npc_runtime.engine.codes",
    "npc_runtime.engine.checkpoints",
    "npc_runtime.engine.weights",
    "npc_runtime.engine.model",
    "npc_runtime.engine.memory",
    "npc_runtime.engine.meter",
    "npc_runtime.engine.model_folder",
    "npc_runtime.engine.quantized",
    "npc_runtime.engine.lora_pair",
    "npc_runtime.engine.peft_config",
    "npc_runtime.engine.peft_folder",
    "npc_runtime.engine.nemo_file",
    "npc_runtime.engine.merged",
    "npc_runtime.engine.host_copies",
    "npc_runtime.engine.adapters",
    "npc_runtime.engine.sampler",
    "npc_runtime.engine.rehearsal",
    "npc_runtime.engine.runner",
    "npc_runtime.engine.engine",
    "npc_runtime.gate",
    "npc_runtime.metrics",
    "npc_runtime.recording",
    "npc_runtime.replay",
    "npc_runtime.figures",
    "npc_runtime.connection",
    "npc_runtime.pages",
    "npc_runtime.server",
    "npc_runtime.serving",
    "npc_runtime.batch",
    "npc_runtime.client",
    "npc_runtime.settings",
    "npc_runtime.loading",
    "npc_runtime.computing",
    "npc_runtime.reload",
    "npc_runtime.handover",
    "npc_runtime.daemon_process",
    "npc_runtime.daemon",
    "npc_runtime.training_lines",
    "npc_runtime.training_state",
    "npc_runtime.adapter_folder",
    "npc_runtime.train",
    "npc_runtime.adapter_import",
    "npc_runtime.evaluation",
    "npc_runtime.evaluation.authored",
    "npc_runtime.evaluation.checks",
    "npc_runtime.evaluation.cases",
    "npc_runtime.evaluation.attribution",
    "npc_runtime.evaluation.losses",
    "npc_runtime.evaluation.speaking",
    "npc_runtime.evaluation.report",
    "npc_runtime.evaluation.tables",
    "npc_runtime.evaluation.picture",
    "npc_runtime.evaluate",
    "npc_runtime.console",
    "npc_runtime.running",
    "npc_runtime.own_daemon",
    "npc_runtime.demo",
    "npc_runtime.bench",
    "npc_runtime.page_link",
    "npc_runtime.chat",
    "npc_runtime.chat_terminal",
    "npc_runtime.top",
    "npc_runtime.doctor",
    "npc_runtime.doctor.finding",
    "npc_runtime.doctor.software",
    "npc_runtime.doctor.machine",
    "npc_runtime.doctor.project",
    "npc_runtime.doctor.examination",
    "npc_runtime.options",
    "npc_runtime.card_commands",
    "npc_runtime.persona_commands",
    "npc_runtime.adapter_commands",
    "npc_runtime.daemon_commands",
    "npc_runtime.cli",
    "npc_runtime.__main__",
]

ENGINE_MAY_IMPORT = {"torch", "triton", "transformers", "tokenizers", "numpy", "safetensors", "npc_kernels"}

# Need numba, which the GPU path does without; `choose_kernels` alone imports them, inside a function.
COMPILED = [
    "npc_kernels.cpu",
    *(f"npc_kernels.cpu_{name}" for name in ("jit", "tape", "rows", "attend", "codes", "draw", "exact")),
]

WITHOUT_TORCH = [
    "npc_runtime.history",
    "npc_runtime.cast",
    "npc_runtime.protocol",
    "npc_runtime.codec",
    "npc_runtime.line",
    "npc_runtime.stage",
    "npc_runtime.draft",
    "npc_runtime.turns",
    "npc_runtime.prepare",
    "npc_runtime.warmup",
    "npc_runtime.effects",
    "npc_runtime.door",
    "npc_runtime.dialogue",
    "npc_runtime.whole_file",
    "npc_runtime.condition",
    "npc_runtime.document",
    "npc_runtime.document_change",
    "npc_runtime.schema",
    "npc_runtime.problems",
    "npc_runtime.prompt",
    "npc_runtime.persona",
    "npc_runtime.wire_document",
    "npc_runtime.persona_folder",
    "npc_runtime.session",
    "npc_runtime.stopping",
    "npc_runtime.owner",
    "npc_runtime.logs",
    "npc_runtime.project_lock",
    "npc_runtime.discovery",
    "npc_runtime.daemon_process",
    "npc_runtime.gate",
    "npc_runtime.metrics",
    "npc_runtime.pages",
    "npc_runtime.recording",
    "npc_runtime.replay",
    "npc_runtime.connection",
    "npc_runtime.server",
    "npc_runtime.serving",
    "npc_runtime.settings",
    "npc_runtime.reload",
    "npc_runtime.handover",
    "npc_runtime.daemon",
    "npc_runtime.page_link",
    "npc_runtime.client",
    "npc_runtime.console",
    "npc_runtime.card_folder",
    "npc_runtime.options",
    "npc_runtime.card_commands",
    "npc_runtime.persona_commands",
    "npc_runtime.adapter_commands",
    "npc_runtime.daemon_commands",
    "npc_runtime.cli",
    "npc_runtime.running",
    "npc_runtime.own_daemon",
    "npc_runtime.demo",
    "npc_runtime.bench",
    "npc_runtime.chat",
    "npc_runtime.chat_terminal",
    "npc_runtime.top",
    "npc_runtime.doctor",
    "npc_runtime.doctor.finding",
    "npc_runtime.doctor.software",
    "npc_runtime.doctor.machine",
    "npc_runtime.doctor.project",
    "npc_runtime.doctor.examination",
    "npc_runtime.evaluation.authored",
    "npc_runtime.evaluation.checks",
    "npc_runtime.evaluation.cases",
    "npc_runtime.evaluation.attribution",
    "npc_runtime.engine.core",
    "npc_runtime.engine.blocks",
    "npc_runtime.engine.books",
    "npc_runtime.engine.commands",
    "npc_runtime.engine.pages",
    "npc_runtime.engine.scheduler",
    "npc_runtime.engine.pace",
    "npc_runtime.engine.watchdog",
    "npc_runtime.engine.ending",
    "npc_runtime.engine.speech",
    "npc_runtime.engine.embedded",
    "npc_runtime.engine.base_folder",
    "npc_runtime.engine.hub_process",
    "npc_runtime.engine.hub",
    "npc_runtime.engine.bases",
]


def module_name(path):
    relative = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for folder in (ROOT / "npc_runtime", ROOT / "kernels" / "npc_kernels")
    for path in sorted(folder.rglob("*.py"))
}


def imported(path, *, module_level=False):
    """Names of modules that a file imports at run time; type-checking blocks do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if module_level else ast.walk(tree)
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place():
    assert set(SOURCES) - {"npc_kernels"} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_down(name):
    above = set(LAYERS[: LAYERS.index(name)])
    ours = {module for module in imported(SOURCES[name]) if module in LAYERS}
    assert ours - {name} <= above


@pytest.mark.parametrize("name", [name for name in LAYERS if ".engine." in name or "npc_kernels" in name])
def test_the_engine_needs_little_when_it_is_imported(name):
    outside = {module.split(".")[0] for module in imported(SOURCES[name], module_level=True)}
    outside -= set(sys.stdlib_module_names)
    allowed = ENGINE_MAY_IMPORT | ({"npc_runtime"} if "engine" in name else set())
    assert outside <= allowed | ({"numba", "llvmlite"} if name in COMPILED else set())
    if name not in COMPILED:
        assert not set(COMPILED) & set(imported(SOURCES[name], module_level=True))
    ours = {m for m in imported(SOURCES[name]) if m.startswith("npc_runtime.") and m in LAYERS}
    assert all(m == "npc_runtime.errors" or m.startswith("npc_runtime.engine") for m in ours)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_torch_is_not_imported_by(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_help_answers_at_once():
    """Under half a second, the best of five on a noisy machine."""
    times = []
    for _ in range(5):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-P", "-m", "npc_runtime", "--help"], capture_output=True, text=True)
        times.append(time.monotonic() - started)
        assert done.returncode == 0
        assert "serve" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.endswith("__main__")])
def test_public_names_are_listed_and_true(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert listed == sorted(listed, key=sort_key)
    body = ast.parse(SOURCES[name].read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    public = {node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")}
    commands = {
        "serve",
        "demo",
        "bench",
        "page",
        "train",
        "quantize_base",
        "DType",
        "Quantize",
        "LogLevel",
        "Part",
        "evaluate",
    }
    of_personas = {f"persona_{verb}" for verb in ("new", "list", "show", "check", "render")}
    unlisted = {"npc_runtime.cli": commands, "npc_runtime.persona_commands": of_personas}
    assert public - set(listed) <= unlisted.get(name, set())
    for public in listed:
        assert hasattr(module, public)


def sort_key(name):
    """Ruff's order (RUF022): constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_every_module_says_what_it_is():
    for name, path in SOURCES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name
