# Everything from a fresh checkout, with Python >= 3.10, make and a C compiler:
#   make demo    calibrate the bundled model, export it, run it at several precisions (a few minutes)
#   make test    all tests
#   make cuda    the library for NVIDIA GPUs, with nvcc; everything else works without it
#   make lint    style of the Python and warnings of the C
#   make clean   remove what was built here (not .venv)
# Sanitizers, fuzzers, sweeps: tests/c/checks.mk

PYTHON ?= python3
CC ?= cc
# Where it is installed, lint reads the Arm kernels too and tests/test_neon.py runs them.
ARM_CC ?= aarch64-linux-gnu-gcc

BIN := .venv/bin
INSTALLED := .venv/.installed
NATIVE := runtime/_native.abi3.so
C_SOURCES := $(wildcard runtime/src/*.c runtime/kernels/*.c runtime/program/*.c)
C_HEADERS := $(wildcard runtime/include/*.h runtime/src/*.h runtime/kernels/*.h runtime/program/*.h)
# -O2: without it gcc makes macros of some intrinsics, whose own conversions would be reported here.
C_WARNINGS := -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wconversion -Werror

NVCC ?= nvcc
CUDA_LIBRARY := runtime/libmobiquant_cuda.so
CUDA_SOURCES := $(wildcard runtime/kernels/*.cu runtime/kernels/cuda/*.cuh)
# Jetson Orin is 8.7. The last entry is code that later GPUs compile for themselves.
CUDA_TARGETS ?= $(foreach n,80 86 87 89,-gencode arch=compute_$(n),code=sm_$(n)) \
  -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90
# No contraction and IEEE divisions and roots: the bits of the CPU.
CUDA_FLAGS := -std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -Iruntime/include -Iruntime/src -Iruntime/kernels \
  -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Werror all-warnings -shared

DEMO_MODEL := mobiquant/demo/tale-6m
DEMO_CHECKPOINT := demo/tale-6m
DEMO_FILE := demo/tale-6m.gguf
DEMO_PROMPT := The old house stood at the end of the lane, and

.PHONY: demo test cuda lint lint-c clean install
.DELETE_ON_ERROR:

demo: $(DEMO_FILE)
	@for bits in 2.5 4 6; do \
	  printf '\n--- average %s bits ---\n%s' $$bits "$(DEMO_PROMPT)"; \
	  $(BIN)/mobiquant run -m $(DEMO_FILE) -p "$(DEMO_PROMPT)" -n 60 --avg-bits $$bits --seed 1 || exit 1; \
	done
	@echo
	$(BIN)/python tests/benchmarks/demo_table.py $(DEMO_FILE) mobiquant/demo/heldout.txt

test: $(NATIVE)
	$(BIN)/python -m pytest -q

cuda: $(CUDA_LIBRARY)

$(CUDA_LIBRARY): $(CUDA_SOURCES) $(C_HEADERS) Makefile
	$(NVCC) $(CUDA_FLAGS) $(CUDA_TARGETS) runtime/kernels/cuda.cu -o $@

lint: $(INSTALLED) lint-c
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-c:
	$(CC) $(C_WARNINGS) -fsyntax-only -Iruntime/include -Iruntime/src $(C_SOURCES)
	if command -v $(ARM_CC) > /dev/null; then \
	  $(ARM_CC) $(C_WARNINGS) -fsyntax-only -Iruntime/include -Iruntime/src $(C_SOURCES) tests/qemu/kernels_check.c; \
	fi

clean:
	rm -rf build dist demo *.egg-info $(NATIVE) $(CUDA_LIBRARY) runtime/_native.c

install: $(NATIVE)

$(DEMO_FILE): $(DEMO_CHECKPOINT)/model.safetensors.index.json $(wildcard export/*.py)
	$(BIN)/python -m export.to_gguf $(DEMO_CHECKPOINT) -o $@ --name tale-6m

# The index file is the last that a calibration writes.
$(DEMO_CHECKPOINT)/model.safetensors.index.json: | $(NATIVE)
	$(BIN)/mobiquant calibrate $(DEMO_MODEL) -o $(DEMO_CHECKPOINT) --samples 16 --distill-steps 40 --distill-batch 4

$(NATIVE): $(C_SOURCES) $(C_HEADERS) runtime/_build.py $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt 'setuptools>=77' -e '.[test]'
	@touch $@

include tests/c/checks.mk
