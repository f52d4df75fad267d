# Everything a user or CI runs. Each target makes the virtual environment it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed  ## fine-tune the embedded ViT by RLRR and by a linear probe, and compare
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## kernel benchmarks, a slice that suits the device
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlrr_kernels needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
