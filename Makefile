# make demo: the main job on the demo model.   make test: everything that must hold.
# make docs: the site, in runs/site.            make dist: what can be installed, in dist.
# All set up what they need: a virtual environment, pinned packages, the demo assets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
GALLERY := runs/gallery

.PHONY: demo figures test install lint types unit bench notebooks docs dist clean

demo: install
	$(BIN)/entangle demo --out $(RUN) --force

# The gallery in figures/, all of it from the demo model: about half an hour on 2 cores.
figures: install
	$(BIN)/entangle score --layer all --proj mlp --n-seq 16 --seq-len 1024 \
	    --out $(GALLERY)/scores --force
	$(BIN)/entangle allocate $(GALLERY)/scores --sparsity 0.7 --rule linear --across model --experts 4 \
	    --out $(GALLERY)/allocation.safetensors --force
	$(BIN)/entangle decompose --layer 1 --proj gate_proj --n-seq 32 --seq-len 1024 \
	    --out $(GALLERY)/decomposition --force
	$(BIN)/entangle ablate --layer '*.mlp.gate_proj' --layer '*.mlp.up_proj' \
	    --select top,random --by wd,variance,weight_norm,abs_mean --seeds 3 \
	    --strength 0.9,0.95,0.99 \
	    --measure perplexity,divergence --n-seq 16 --seq-len 1024 \
	    --eval-seq-len 512 --eval-windows 8 --no-md --out $(GALLERY)/ablation --force
	$(BIN)/entangle figures $(GALLERY)/scores $(GALLERY)/allocation.safetensors \
	    $(GALLERY)/decomposition $(GALLERY)/ablation \
	    --out $(GALLERY)/figures --format png --force
	$(BIN)/python -m benchmarks.comparison_figure $(GALLERY)/figures
	mkdir -p figures
	cp $(GALLERY)/figures/*.png $(GALLERY)/figures/*.txt figures/

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

# Two processes of one thread each.
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

bench: install
	$(BIN)/python -m benchmarks.scoring

# Every notebook with its outputs, as a page to read: some minutes each.
notebooks: install
	$(BIN)/jupyter nbconvert --execute --to html --output-dir runs/notebooks notebooks/*.ipynb

# The site, with every warning an error and every link checked; what it says of commands and
# functions is read from the code.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Only the site needs these packages.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# The same bytes for the same commit.
dist: install
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m hatchling build -d dist

clean:
	rm -rf $(VENV) runs dist .mypy_cache .pytest_cache .ruff_cache
