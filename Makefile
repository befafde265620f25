# Every target sets its own environment up. `make demo`, `make test`, `make lint`, `make zoo`,
# `make clean`.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
ZOO_ARGS ?=
# More arguments for pip, for example an index with builds of torch without CUDA.
PIP_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint zoo lock clean

demo: $(STAMP)
	$(BIN)/dropsurgery demo $(DEMO_ARGS)

# A worker a core, each on one thread, is faster than one worker whose torch takes every core.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sweeps over the models of timm and torchvision: docs/zoo.md, docs/slim.md and the JSON beside
# them. They go on where an interrupted one stopped; ZOO_ARGS="--only 'timm:vit*'" for a part.
zoo: $(STAMP)
	$(BIN)/python -m pip install -qq $(PIP_ARGS) -c constraints.txt -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo $(ZOO_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.slim $(ZOO_ARGS)

# Writes what is installed down as the new constraints. torch goes without its build (+cpu, +cu130),
# so that pip takes the one that the machine's own index or --find-links offers.
lock: $(STAMP)
	{ echo "# Every package of the development environment, exactly. Written by: make lock"; \
	  $(BIN)/python -m pip freeze --all --exclude-editable | sed -E 's/^(torch(vision)?==[^+]*).*/\1/'; \
	} > constraints.txt

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Made last and only when every step before it succeeded, so that an interrupted set-up starts again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dropsurgery needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV): the first time takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq $(PIP_ARGS) -c constraints.txt pip
	$(BIN)/python -m pip install -qq $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@
