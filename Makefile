# Every target sets up what it needs. TORCH_INDEX: a PyTorch wheel index, e.g. for CPU-only Linux machines
# make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-avx2 soak check compile gpu bench generate clean

demo: $(VENV)/.runtime
	@$(BIN)/npc-runtime demo

test: $(VENV)/.dev
	@$(BIN)/python -P -m pytest

# What depends on the processor once more, computed as on one without AVX-512, which is what most laptops have.
test-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
test-avx2: export ATEN_CPU_CAPABILITY := avx2
test-avx2: export NUMBA_CPU_NAME := haswell
test-avx2: export NUMBA_CPU_FEATURES := +avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2
test-avx2: $(VENV)/.dev
	@$(BIN)/python -P -m pytest -q tests/test_kernels.py tests/test_exact.py tests/test_model.py tests/test_parity.py

# The long form of what `make test` does shortly: 100,000 frames of nonsense, 1,000 clients that vanish, ten minutes of
# play with 32 streams. About twenty minutes.
soak: export NPC_SOAK := 1
soak: $(VENV)/.dev
	@$(BIN)/python -P -m pytest -s tests/test_reliability.py

check: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Triton's kernels for real GPUs, without one: registers, shared memory, spills. make compile TARGETS=86,90
compile: $(VENV)/.dev
	@$(BIN)/python kernels/compile.py $(if $(TARGETS),--targets $(TARGETS))

# On an NVIDIA GPU: proofs, then the table of kernels/README.md, in less than nine minutes. With the Python at hand if it
# has all that is needed; otherwise with $(VENV). make gpu MINUTES=4 PICTURE=gpu.svg PARTS=parity,graphs
gpu:
	@python=$(PYTHON); $(PYTHON) -c "$$HAS_ALL_FOR_GPU" 2>/dev/null || \
		{ python=$(BIN)/python; $(MAKE) --no-print-directory $(VENV)/.dev; } && \
		$$python benchmarks/gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PICTURE),--picture $(PICTURE)) \
		$(if $(PARTS),--parts "$(PARTS)")
export HAS_ALL_FOR_GPU := from importlib.util import find_spec; \
	assert all(map(find_spec, "torch triton transformers peft numpy safetensors".split()))

# Side by side with llama-server, vLLM and PEFT, each set up once in a venv below BENCH_DIR (llama.cpp is compiled:
# it needs a C++ compiler and a while). make bench PEERS=llama-server NPCS=1,8 AVX2=1 BENCH_DIR=…; PEERS=none: ours alone
bench: export TORCH_INDEX := $(TORCH_INDEX)
bench: $(VENV)/.runtime
	@$(BIN)/python benchmarks/peers.py $(if $(PEERS),--peers $(PEERS)) $(if $(NPCS),--npcs $(NPCS)) \
		$(if $(AVX2),--avx2) $(if $(BENCH_DIR),--root $(BENCH_DIR))

# Writes PROTOCOL.md and tests/golden/ from the models; tests fail when they are stale.
generate: $(VENV)/.dev
	@$(BIN)/python tests/generate.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "npc-runtime needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) (a few minutes the first time; torch is the large one)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# torch first and pinned. PyPI's for Linux brings about 3 GB of CUDA; TORCH_INDEX chooses another build.
$(VENV)/.runtime: $(BIN)/python pyproject.toml constraints.txt
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) install -c constraints.txt -e '.[dev,train]'
	@touch $@

clean:
	rm -rf $(VENV) .bench build *.egg-info
