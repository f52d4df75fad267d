# Everything a user or CI runs. Each target makes the virtual environment it needs; with VENV= (empty), as in
# `make test VENV= PYTHON=python3.12`, there is none: that Python is used as it is, nothing is installed or downloaded,
# and the libraries are built in place where they can be (RLRR_BUILD_CUDA=0 leaves a CUDA library that is there).
PYTHON ?= python3
VENV   ?= .venv
PY     := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
BIN    := $(if $(VENV),$(VENV)/bin/)
READY  := $(if $(VENV),$(VENV)/.built,built-in-place)
# the tests start hundreds of processes, each of which would compile the package anew
unexport PYTHONDONTWRITEBYTECODE
CXX_FILES := $(shell find csrc tests -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# minutes that `make soak` takes
MINUTES ?= 60

# how the test suite is spread over processes; empty where there is no pytest-xdist
PARALLEL ?= -n 2 --dist worksteal

# what `make floor` tests with
FLOOR := 'torch==2.11.*' 'numpy<2.4'

# that `make gates` compiles with
TRITON ?= 3.6.0 3.7.1 3.8.0 newest

# of `make first-day`; REHEARSE=1 runs them on a pretended GPU, for the plumbing alone
STAGE ?= env build correct ratios tests

# What reaches the CPU library, its AVX2 loops and PyTorch's BLAS: run as on a CPU that has no more. Tests of files and
# names, and of the choice of a backend, look at nothing that an instruction computes.
LIMITED_TESTS := tests/backends tests/reliability tests/ops tests/layers/test_linear.py
LIMITED_TESTS += --ignore=tests/backends/test_choice.py
LIMITED_TESTS += $(patsubst %,--ignore=tests/reliability/test_%.py,hostile_files killed_runs full_disk heads state_dict)
LIMITED_TESTS += -k "not triton and not cuda and not hopper" -m "not slow"
AVX2 := RLRR_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
# compiled for other instructions than the rest of the suite's
AVX2 += TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2

.PHONY: demo test test-all soak lint format bench bench-gpu report floor gates sanitize first-day built-in-place clean

demo: $(READY)  ## fine-tune the embedded ViT by RLRR and by a linear probe, and compare
	$(PY) examples/demo.py

test: $(READY)  ## the test suite without its campaigns, in about 4 minutes on two cores
	$(PY) -m pytest $(PARALLEL) -m "not slow"

test-all: $(READY)  ## the whole suite, and what reaches the CPU library once more with AVX2 alone
	$(PY) -m pytest $(PARALLEL)
	$(AVX2) $(PY) -m pytest $(PARALLEL) $(LIMITED_TESTS)

soak: $(READY)  ## MINUTES of new random problems for every backend; prints how many, and how to repeat a failure
	OMP_NUM_THREADS=1 $(PY) -m tests.reliability.soak --minutes $(MINUTES)

lint: $(READY)  ## style and types
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)mypy

format: $(READY)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(CXX_FILES)

bench: $(READY)  ## the slice for a CPU, every rival and however long it takes, into the raw results
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest benchmarks --results --results-command 'make bench'

bench-gpu: $(READY)  ## all benchmarks on a GPU, or those chunks whose names start with CHUNK
	$(PY) -m benchmarks.chunks $(CHUNK)

report: $(READY)  ## docs/benchmarks.md and its plots, from the raw results of every device
	$(PY) -m benchmarks.report

floor: $(VENV)/.built  ## the suite with the oldest torch and Triton, on the libraries built against the newest
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet $(FLOOR) 'setuptools>=77'
	# the versions again: a newer torchvision would bring its own torch
	RLRR_BUILD_CPU=0 RLRR_BUILD_CUDA=0 $(VENV)-floor/bin/python -m pip install --quiet --editable '.[test]' $(FLOOR)
	$(VENV)-floor/bin/python -m pytest $(PARALLEL)

gates: $(READY)  ## Hopper kernels, as each TRITON compiles them: hazards, spills, steps, read from machine code
	$(PY) -m tests.gates $(TRITON)

sanitize: $(READY)  ## on a GPU: every kernel, Triton's and Hopper's too, under memcheck and racecheck
	$(PY) -m benchmarks.first_day sanitize --limit 3600

# which builds the library itself, within its time, where there is no virtual environment
first-day: $(if $(VENV),$(READY))  ## on a new GPU: STAGEs that end in a table within ten minutes
	$(PY) -m benchmarks.first_day $(if $(filter-out 0,$(REHEARSE)),--rehearse) $(STAGE)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlrr_kernels needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	# torch first: the build below uses its headers
	$(PY) -m pip install --quiet 'torch>=2.11' 'setuptools>=77'
	RLRR_BUILD_CPU=0 RLRR_BUILD_CUDA=0 $(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(shell find csrc -type f)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

built-in-place:
	$(PY) setup.py --quiet build_ext --inplace

clean:
	rm -rf $(if $(VENV),$(VENV) $(VENV)-floor) build dist rlrr_kernels/lib *.egg-info .pytest_cache .ruff_cache .mypy_cache
