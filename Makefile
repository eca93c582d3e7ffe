# `make demo` and `make test` need Python >= 3.10 and nothing else: each makes .venv with the tested versions first.
PYTHON ?= python3
OUT ?= demo
# PyTorch's own index of CPU builds, asked only where there is no NVIDIA GPU
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN = .venv/bin
TORCH = $(shell sed -n 's/^torch==//p' requirements.txt)

.PHONY: demo test lint clean

demo: .venv/ready            ## phantom (or DATA=<MSD folder>), training, inference, evaluation, table and picture in $(OUT)/
	$(BIN)/python -W ignore -m tools.demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(EPOCHS),--epochs $(EPOCHS))

test: .venv/ready            ## the whole suite
	$(BIN)/python -m pytest

lint: .venv/ready            ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/ready: requirements.txt setup.cfg
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	command -v nvidia-smi >/dev/null || $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/pip install -q --retries 0 --timeout 10 --extra-index-url $(CPU_INDEX) "torch==$(TORCH)+cpu" 2>/dev/null || true
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q -e .[test]
	touch $@

clean:                       ## remove the environment and the demo
	rm -rf .venv $(OUT)
