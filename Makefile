# make demo | test | test-slow | kernels | lint | clean        Override: PYTHON, TORCH, WORKERS, PYTEST_ARGS.
PYTHON ?= python3
# installed first and alone, so that no later requirement chooses another build of torch
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard hf_bitnet tests recipes benchmarks model_cards)
TYPED := $(wildcard hf_bitnet recipes benchmarks model_cards)
KERNELS := hf_bitnet/kernels/cpu/CMakeLists.txt $(wildcard hf_bitnet/kernels/cpu/src/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# one thread per worker: more of them only wait for each other
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow kernels lint clean

help:
	@echo "make demo       quantize, train and pack a small model, with figures"
	@echo "make test       fast tests"
	@echo "make test-slow  the tests that take longer"
	@echo "make kernels    compile the CPU kernels again (the others do it when their sources have changed)"
	@echo "make lint       formatting, lint rules, types"
	@echo "make clean      remove $(VENV) and caches"

venv: $(STAMP)

# the installation compiles the kernels, so that it is repeated when their sources change
$(STAMP): pyproject.toml $(KERNELS)
	@test -x $(BIN)/python || { echo "==> creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "==> installing $(TORCH) (a few minutes)"; $(PIP) install '$(TORCH)'; }
	@echo "==> installing hf_bitnet and its requirements"
	@$(PIP) install -e '.[dev]'
	@$(BIN)/python -c "from hf_bitnet.kernels.cpu import library; print('==> CPU kernels:', library.describe())"
	@touch $@

kernels:
	@$(PIP) install --no-deps -e .
	@$(BIN)/python -c "from hf_bitnet.kernels.cpu import library; print(library.describe())"

demo: $(STAMP)
	@$(BIN)/hf-bitnet demo

test: $(STAMP)
	@echo "==> fast tests"
	@$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP)
	@echo "==> slow tests"
	@$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check $(SOURCES)
	@echo "==> ruff check"
	@$(BIN)/ruff check $(SOURCES)
	@echo "==> pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python $(TYPED)

clean:
	@rm -rf $(VENV) .pytest_cache .ruff_cache build dist hf_bitnet/kernels/cpu/libhf_bitnet_cpu.*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "removed $(VENV) and caches"
