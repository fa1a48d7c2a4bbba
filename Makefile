# `make train` and `make test` need Python 3.10 or newer, a C++ compiler and make; everything else they install into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SANITIZED := build/sanitized
# Where there are C++ and Triton kernels; those of the prompt ops are C++ and CUDA C++.
KERNEL_TESTS := $(addprefix tests/,advantage arc_efe efe_loss policy_loss returns reward fuzz)
EMULATED := build/emulated
# The oldest release of Triton that pyproject.toml admits; OLDEST_TRITON=3.6 compiles with another one.
OLDEST_TRITON ?= $(shell sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml)
OLDEST := build/triton-$(OLDEST_TRITON)
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := $(shell find csrc -type f) setup.py efe_kernels/__init__.py
# A CUDA build of torch, of another minor release than the one in constraints.txt: so two releases are tested, each also
# with what was built with the other.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV := .venv-cuda
CUDA_PIP := $(CUDA_VENV)/bin/python -m pip install --quiet --constraint $(CUDA_VENV)/constraints.txt
CUDA_ARCH ?= 9.0
TRAIN_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
INSTALL_ARGS ?=
# Random calls of each public function, and what chooses them.
FUZZ_CASES ?= 2000
FUZZ_SEED := $(or $(FUZZ_SEED),$(shell date +%s))

.PHONY: help train test fuzz sanitize emulate install-matrix audit cuda-build aot aot-pinned aot-oldest projection bench \
    gpu docs lint clean

help:
	@echo "make train     set up .venv, build, train on the ARC-AGI-1 tasks (TRAIN_ARGS=... are handed to efe-train)"
	@echo "make test      set up .venv, build, run every test that this machine can run"
	@echo "make fuzz      FUZZ_CASES random calls of every public function against its definition (FUZZ_SEED repeats a run)"
	@echo "make sanitize  the tests of the C++ kernels under AddressSanitizer and UBSan (needs GCC)"
	@echo "make emulate   the CUDA C++ kernels on the CPU: tests/prompt on them, and tests/emulated under sanitizers"
	@echo "make install-matrix  every way to install the package, each in an environment of its own (INSTALL_ARGS=...)"
	@echo "make audit     known vulnerabilities of what .venv holds (asks a service on the network)"
	@echo "make cuda-build  install beside CUDA_TORCH in .venv-cuda, CUDA sources included, and test that without a GPU;"
	@echo "               then what is built with either torch beside the other"
	@echo "make aot       compile every GPU kernel ahead of time and check registers, spills and instructions, with the"
	@echo "               pinned Triton (make aot-pinned) and with the oldest that is supported (make aot-oldest)"
	@echo "make projection  how long the kernels must take at least on an H100 and an H200, without a GPU"
	@echo "make bench     time every op and the training against what else does the job (BENCH_ARGS=... are handed on)"
	@echo "make gpu       with PYTHON's torch: build, tests, sanitizers, training and benchmarks on this machine's GPU"
	@echo "make docs      the documentation as a site in build/site, warnings being errors"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove .venv and everything built"

train: $(VENV)/.built
	$(BIN)/efe-train $(TRAIN_ARGS)

# The second run puts the Triton kernels behind the same ops and tests, executed by Triton's interpreter; `emulate` does
# so with the CUDA C++ kernels.
test: $(VENV)/.built
	$(BIN)/python -m pytest --numprocesses auto --ignore tests/emulated
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto $(KERNEL_TESTS) tests/test_peers.py
	$(MAKE) emulate

# In parts, which several processes share; a process that dies is named with the part that it was at.
fuzz: $(VENV)/.built
	@echo "FUZZ_SEED=$(FUZZ_SEED)"
	OMP_NUM_THREADS=1 EFE_FUZZ_CASES=$(FUZZ_CASES) EFE_FUZZ_PARTS=8 EFE_FUZZ_SEED=$(FUZZ_SEED) \
	$(BIN)/python -m pytest --numprocesses auto tests/fuzz

# The tests run beside the instrumented package: what stands next to `tests` is what they import. Capturing only Python's
# own output lets the report of a sanitizer through; an extension that does not load is an error, not a warning.
sanitize: $(VENV)/.built
	CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	LDFLAGS="-fsanitize=address,undefined" EFE_KERNELS_CUDA=0 \
	$(BIN)/python setup.py --quiet build --build-temp $(SANITIZED)/objects --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests $(SANITIZED)/bench $(SANITIZED)/csrc
	cp -r tests bench csrc $(SANITIZED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/python -m pytest --capture=sys -W error:efe_kernels -m "not slow" $(KERNEL_TESTS) tests/prompt

# The CUDA C++ sources without a GPU: tests/prompt beside a package whose extension has the emulated CUDA kernels for CPU
# tensors, then the emulator's own tests, its driver under sanitizers, and the mutations that must be caught.
emulate: $(VENV)/.built
	$(BIN)/python -m tests.emulated.extension --quiet build --build-temp $(EMULATED)/objects --build-lib $(EMULATED)
	rm -rf $(EMULATED)/tests $(EMULATED)/csrc
	cp -r tests csrc $(EMULATED)
	cd $(EMULATED) && $(abspath $(BIN))/python -m pytest --capture=sys -W error:efe_kernels -p tests.emulated.served \
	-m "not slow" tests/prompt
	$(BIN)/python -m pytest tests/emulated

install-matrix: $(VENV)/.built
	$(BIN)/python -m tests.install.matrix $(INSTALL_ARGS)

# Strict: a package of which the service knows nothing is an error. Local versions, such as 2.13.0+cpu, are no releases.
audit: $(VENV)/.built
	$(PIP) pip-audit
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > build/audited.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement build/audited.txt

# Nothing of the source tree must serve the tests in place of what was installed: pytest appends it to the path.
ifeq ($(shell command -v nvcc),)
cuda-build:
	@echo "make cuda-build is left out: nvcc is not on the PATH."
else
cuda-build: $(VENV)/.built $(CUDA_VENV)/.torch
	TORCH_CUDA_ARCH_LIST=$(CUDA_ARCH) EFE_KERNELS_CUDA=1 $(CUDA_PIP) --no-build-isolation ".[test]"
	cd $(CUDA_VENV) && bin/python -W error:efe_kernels -m efe_kernels.info
	EFE_KERNELS_CUDA=1 EFE_KERNELS_OTHER_PYTHON=$(BIN)/python \
	$(CUDA_VENV)/bin/pytest --import-mode=append --numprocesses auto --ignore tests/emulated
	EFE_KERNELS_OTHER_PYTHON=$(CUDA_VENV)/bin/python $(BIN)/python -m pytest tests/common/test_other_torch.py
endif

# What the compilers make of every GPU kernel, against the committed budgets. Needs no GPU; CUDA C++ needs nvcc.
aot: aot-pinned aot-oldest

aot-pinned: $(VENV)/.built
	$(BIN)/python -m bench.aot --check

# One architecture, the one that has budgets: each takes minutes.
aot-oldest: $(VENV)/.built $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m bench.aot --check --no-cuda --arch sm_90

projection: $(VENV)/.built
	$(BIN)/python -m bench.aot --projection

bench: $(VENV)/.bench
	$(BIN)/python -m bench $(BENCH_ARGS)

# Needs no network and no environment of its own: only a python3 with torch, triton, pytest and pytest-benchmark.
gpu:
	$(PYTHON) -m bench.gpu $(GPU_ARGS)

docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info efe_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch "setuptools>=77" wheel ninja "pybind11>=2.13"
	touch $@

# The torch at hand brings its own Triton.
$(CUDA_VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -v -e ^torch= -e ^triton= constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_PIP) $(CUDA_TORCH) "setuptools>=77" wheel ninja "pybind11>=2.13"
	touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[train,test,dev,docs]"
	$(BIN)/python -m efe_kernels.info
	touch $@

# Beside the environment, not in it: constraints.txt pins another release there.
$(OLDEST)/.installed: $(VENV)/.torch
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) "triton==$(OLDEST_TRITON).*"
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[bench]"
	touch $@
