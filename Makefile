# Everything a user or CI runs. Each target makes the virtual environment it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CXX_FILES := $(shell find csrc tests/cuda_host tests/backends -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# minutes that `make soak` takes
MINUTES ?= 60

# What reaches the CPU library, its AVX2 loops and PyTorch's BLAS: run as on a CPU that has no more
LIMITED_TESTS := tests/backends tests/reliability tests/test_functional.py tests/test_linear.py tests/test_ops.py
LIMITED_TESTS += -k "not triton and not cuda and not host" -m "not slow"
AVX2 := RLRR_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
# compiled for other instructions than the rest of the suite's
AVX2 += TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2

.PHONY: demo test test-all soak lint format bench bench-gpu report floor sanitize clean

demo: $(VENV)/.built  ## fine-tune the embedded ViT by RLRR and by a linear probe, and compare
	$(BIN)/python examples/demo.py

test: $(VENV)/.built  ## the test suite without its campaigns, in under 5 minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/.built  ## the whole suite, and what reaches the CPU library once more with AVX2 alone
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(AVX2) $(BIN)/python -m pytest -n 2 --dist worksteal $(LIMITED_TESTS)

soak: $(VENV)/.built  ## MINUTES of new random problems for every backend; prints how many, and how to repeat a failure
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.soak --minutes $(MINUTES)

lint: $(VENV)/.built  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.built  ## the slice for a CPU, every rival and however long it takes, into the raw results
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest benchmarks --results --results-command 'make bench'

bench-gpu: $(VENV)/.built  ## all benchmarks on a GPU, or those chunks whose names start with CHUNK
	$(BIN)/python -m benchmarks.chunks $(CHUNK)

report: $(VENV)/.built  ## docs/benchmarks.md and its plots, from the raw results of every device
	$(BIN)/python -m benchmarks.report

floor: $(VENV)/.built  ## the suite with the oldest torch and Triton, on the libraries built against the newest
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet 'torch==2.11.*' 'numpy<2.4' 'setuptools>=77'
	RLRR_BUILD_CPU=0 RLRR_BUILD_CUDA=0 $(VENV)-floor/bin/python -m pip install --quiet --editable '.[test]'
	$(VENV)-floor/bin/python -m pytest -n 2 --dist worksteal

sanitize: $(VENV)/.built  ## on a GPU: the CUDA kernels under compute-sanitizer
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m pytest -m gpu tests/backends/test_numerics.py -k cuda || exit 1; \
	done

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlrr_kernels needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	# torch first: the build below uses its headers
	$(BIN)/python -m pip install --quiet 'torch>=2.11' 'setuptools>=77'
	RLRR_BUILD_CPU=0 RLRR_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-floor build dist rlrr_kernels/lib *.egg-info .pytest_cache .ruff_cache .mypy_cache
