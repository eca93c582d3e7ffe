# `make demo` and `make test` need Python >= 3.10 and nothing else: each makes .venv with the tested versions first.
# OLDEST=1 takes the oldest supported versions instead, in an environment of their own: make test OLDEST=1 PYTHON=python3.10
PYTHON ?= python3
OUT ?= demo
# PyTorch's own index of CPU builds, asked only where there is no NVIDIA GPU
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
REQUIREMENTS = requirements$(if $(OLDEST),-oldest).txt
VENV = .venv$(if $(OLDEST),-oldest)
BIN = $(VENV)/bin
TORCH = $(shell sed -n 's/^torch==//p' $(REQUIREMENTS))
EMPTY = build/empty

.PHONY: demo test lint docs dist clean

demo: $(VENV)/ready          ## phantom (or DATA=<MSD folder>), training, inference, evaluation, table and picture in $(OUT)/
	$(BIN)/python -W ignore -m monai_morse demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(EPOCHS),--epochs $(EPOCHS))

test: $(VENV)/ready          ## the whole suite
	$(BIN)/python -m pytest

lint: $(VENV)/ready          ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/docs           ## the manual in build/site, warnings as errors; its links and sentences are tests of `make test`, too
	$(BIN)/python -m pytest -n 0 tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore -m mkdocs build

dist: $(VENV)/ready          ## wheel and sdist in dist/; the wheel is installed into an empty environment and used
	rm -rf dist build && $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(EMPTY)
	$(call install_torch,$(EMPTY)/bin/pip)
	$(EMPTY)/bin/pip install -q dist/*.whl
	PYTHONPATH=tests $(BIN)/python -W ignore -c "from pathlib import Path; from zoo import write_bundle; write_bundle('spleen', Path('build/bundle'))"
	cd build && empty/bin/monai-morse --version
	cd build && empty/bin/monai-morse bundle hippocampus_mri_morse --out bundles
	cd build && empty/bin/monai-morse demo --epochs 1
	cd build && empty/bin/monai-morse phantom --out phantom --patients 2 --spacing 8 8 10
	cd build && empty/bin/monai-morse wrap --bundle bundle --out wrapped
	cd build && empty/bin/monai-morse report ../results/hippocampus_1mm.csv.gz --out report

# a CPU build of torch where there is no GPU, by the first argument, a pip; no harm if there is none to be had
define install_torch
command -v nvidia-smi >/dev/null || $(1) install -q "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(1) install -q --retries 0 --timeout 10 --extra-index-url $(CPU_INDEX) "torch==$(TORCH)+cpu" 2>/dev/null || true
endef

$(VENV)/ready: $(REQUIREMENTS) setup.cfg
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(call install_torch,$(BIN)/pip)
	$(BIN)/pip install -q -r $(REQUIREMENTS)
	$(BIN)/pip install -q -e .[test]
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/pip install -q -e .[docs]
	touch $@

clean:                       ## remove the environments, what was built and the demo
	rm -rf .venv .venv-oldest build dist $(OUT)
