# `make demo` runs the main job, `make test` every check; each makes .venv first.
PYTHON ?= python3
# Versions to install. With a torch of your own in .venv: make demo CONSTRAINTS=/dev/null
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# Real texts for the tests that want them; what is absent is skipped with its reason.
export FASTFFN_DATA_DIR ?= $(realpath ../shared/data)
# Tests and the demo use only what is installed: nothing is fetched from a hub at run time.
export HF_HUB_OFFLINE ?= 1
export NO_MKDOCS_2_WARNING ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: demo test format lint types unit docs examples torture clean

demo: .venv/train
	$(BIN)/fastffn pretrain --preset demo --output runs/demo --overwrite

test: lint types unit docs examples

.venv/train: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[train]'
	touch $@

.venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/dev
	$(BIN)/mypy

unit: .venv/dev
	$(BIN)/python -m pytest

docs: .venv/dev
	$(BIN)/mkdocs build --strict --quiet

examples: .venv/dev
	set -e; for example in examples/*.py; do echo "$$example"; $(BIN)/python $$example; done

# A run killed fifty times at random; TORTURE_SEED=n repeats one.
torture: .venv/dev
	TORTURE_KILLS=50 $(BIN)/python -m pytest -s tests/train/test_survival.py -k killed_at_random

clean:
	rm -rf .venv build dist site runs
