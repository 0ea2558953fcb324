# Two commands do everything on a fresh machine with Python and a C++ compiler: `make train` and `make test`.
# The first run creates .venv, compiles the CPU kernels and installs; later runs reuse it until what it was made from
# changes. Without a C++ compiler everything still works, on PyTorch's own operations.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
ARGS ?=
PYTEST_ARGS ?=
# CPU threads of each rank; raise it where a machine has more than one core for each.
THREADS ?= 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
TRAIN := examples/train_gpt.py --config examples/ds_config_zero3.json

.DEFAULT_GOAL := help
.PHONY: help install train bench test test-fast soak check format lint types contracts hooks clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

install: $(INSTALLED) ## create .venv and install unishard with everything development needs
	@echo "==> $(VENV) is up to date"

$(INSTALLED): pyproject.toml constraints.txt scripts/install.sh $(wildcard csrc/*)
	@scripts/install.sh $(PYTHON) $(VENV)
	@touch $@

train: $(INSTALLED) ## install if needed, then train a GPT on real text with ZeRO-3 on 2 processes
	@echo "==> training on $(RANKS) ranks: $(TRAIN) $(ARGS)"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m torch.distributed.run \
		--nproc_per_node $(RANKS) --standalone $(TRAIN) $(ARGS)

bench: $(PEERS) ## install the peers if needed, then measure unishard beside them on 2 processes
	@$(BIN)/unishard bench --ranks $(RANKS) --threads $(THREADS) $(ARGS)

$(PEERS): $(INSTALLED)
	@echo "==> installing the peers that unishard is measured with"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt --editable '.[bench]'
	@touch $@

test: $(INSTALLED) check ## install if needed, then run every check and the whole test suite
	@echo "==> tests"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## the tests that take less than five seconds each
	@$(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

soak: $(INSTALLED) ## kill ranks 200 times while they save checkpoints; load every preset's on every number of ranks; long runs
	@UNISHARD_KILLS=200 UNISHARD_ALL_PAIRS=1 UNISHARD_LONG=1 $(BIN)/python -m pytest -q \
		tests/checkpoint/test_kills.py tests/engine/test_checkpoint_matrix.py tests/offload/test_memory_growth.py \
		tests/offload/test_beyond_memory.py tests/integrations/test_transformers.py $(PYTEST_ARGS)

check: lint contracts types ## formatting, lint, import contracts and types

lint: $(INSTALLED) ## formatting and lint
	@echo "==> format and lint"
	@$(BIN)/ruff format --check --quiet --output-format concise . || { echo "run 'make format'"; exit 1; }
	@$(BIN)/ruff check --output-format concise --quiet .

contracts: $(INSTALLED) ## the layers of docs/design.md
	@echo "==> import contracts"
	@$(BIN)/lint-imports --no-cache --no-logo > $(VENV)/contracts.log || { cat $(VENV)/contracts.log; exit 1; }

types: $(INSTALLED) ## type annotations
	@echo "==> types"
	@$(BIN)/pyright --level error

format: $(INSTALLED) ## rewrite the sources in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

hooks: $(INSTALLED) ## run the checks on every git commit
	@$(BIN)/pre-commit install

clean: ## remove .venv and everything generated
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
