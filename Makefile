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

.PHONY: demo test format lint types unit docs examples torture sanitize clean

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

# A process a core, each with one thread; files stay together, for what their tests share.
unit: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

docs: .venv/dev
	$(BIN)/mkdocs build --strict --quiet

examples: .venv/dev
	set -e; for example in examples/*.py; do echo "$$example"; $(BIN)/python $$example; done

# A run killed fifty times at random; TORTURE_SEED=n repeats one.
torture: .venv/dev
	TORTURE_KILLS=50 $(BIN)/python -m pytest -s tests/train/test_survival.py -k killed_at_random

# The tests of the compiled kernels on a build with address and undefined-behaviour sanitizers (gcc).
SANITIZE := build/sanitize
sanitize: .venv/dev
	cmake -S . -B $(SANITIZE) -DFASTFFN_SANITIZE=address,undefined -DPython_EXECUTABLE=$(realpath $(BIN))/python
	cmake --build $(SANITIZE) --parallel 2
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	FASTFFN_SANITIZED=$$(ls $(SANITIZE)/_cpu*.so) \
	$(BIN)/python -m pytest -p tests.sanitized -p no:cacheprovider tests/ops -k "cpu or backends or compiled"

clean:
	rm -rf .venv build dist site runs
