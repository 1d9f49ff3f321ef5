# make demo: the main job on the demo model.   make test: everything that must hold.
# Both set up what they need: a virtual environment, pinned packages, the demo assets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test install lint types unit bench clean

demo: install
	$(BIN)/entangle demo --out $(RUN) --force

test: install lint types unit

install: $(VENV)/.installed

# torch goes first and alone: a pinned version that is already there is not replaced by a larger
# build. constraints.txt holds the versions that the tests ran with.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "entangle needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest

bench: install
	$(BIN)/python -m benchmarks.scoring

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache
