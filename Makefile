# `make demo` and `make test` need Python 3.11+, g++ and make; the rest is set up in .venv by the first of them.
PYTHON ?= python3
MAX_JOBS ?= 2
IMAGE ?=
BENCH ?=
GPU ?=
export MAX_JOBS

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.* csrc/*/*.*) efficientvit_kernels/_build.py
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
CXX_SOURCES += $(wildcard tests/cuda_emulator/*.h tests/cuda_emulator/*.cpp tests/cuda_emulator/*.cu tests/cuda_emulator/samples/*.*)
CXX_SOURCES += $(wildcard tests/cuda_emulator/plain_torch/*.*)

.PHONY: demo test check format build bench gpu gpu-here sanitize nightly abi sdist wheel clean

demo: $(STAMP)
	$(BIN)/python -m efficientvit_kernels demo $(if $(IMAGE),--image "$(IMAGE)")

test: $(STAMP)
	$(BIN)/python -m pytest -n $(MAX_JOBS) --dist worksteal -m "not nightly and not gpu"

# Lint and types first: they fail in seconds. The tests come last, so the output ends with pytest's summary.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

build: $(STAMP)
	$(BIN)/python -m efficientvit_kernels._build

# Against every peer, the runtimes of the extra `bench` among them. Options: make bench BENCH="--set registry --threads 2"
bench: $(STAMP)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/python -m efficientvit_kernels bench $(BENCH)

# Everything that needs a GPU, in parts; docs/gpu-status.md says how to run them one by one. make gpu GPU="--resume"
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu all $(GPU)

# The same with the torch and Triton of $(PYTHON): nothing is installed or built.
gpu-here:
	$(PYTHON) -m benchmarks.gpu all $(GPU)

# Address and undefined-behaviour sanitizers on every instruction set that this CPU has, and on the CUDA kernels in the
# emulator. Races between tasks or threads and planted faults, which must be reported, come with `make nightly`.
sanitize: $(STAMP)
	$(BIN)/python -m pytest tests/test_sanitizers.py tests/cuda_kernels/test_sanitized.py -k test_memory --nightly

# Everything: long fuzzing, mutants, sanitizers with planted faults, both resource tables anew. Hours on two cores.
nightly: $(STAMP)
	EVK_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -m "not gpu" --nightly

# The oldest supported torch in an environment of its own, for the test that one binary serves both.
abi: $(STAMP)
	$(PYTHON) -m venv .venv-abi
	.venv-abi/bin/pip install "torch==$(or $(ABI_TORCH),2.13.0)" numpy
	EVK_ABI_PYTHON=$(CURDIR)/.venv-abi/bin/python $(BIN)/python -m pytest tests/test_abi.py --nightly

sdist: $(STAMP)
	$(BIN)/python -m build --sdist --no-isolation

# With the CUDA library, which needs nvcc and no GPU: make wheel EFFICIENTVIT_KERNELS_CUDA_ARCHS="80;90" for fewer GPUs.
wheel: $(STAMP)
	FORCE_CUDA=1 EFFICIENTVIT_KERNELS_CUDA_ARCHS="$(or $(EFFICIENTVIT_KERNELS_CUDA_ARCHS),all)" \
	    $(BIN)/python -m build --wheel --no-isolation

# torch comes first: the native build compiles against it. An editable install, so that sources are used in place.
$(STAMP): pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet --progress-bar off "torch>=2.11" torchvision "setuptools>=77" ninja pybind11
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache efficientvit_kernels/*.so
