# What people and CI run. Needs Python >= 3.11 with venv, g++ and make; everything else comes into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CSRC := $(wildcard csrc/*.cc csrc/*.h)
CSRC_TESTS := $(wildcard csrc/tests/*.cc csrc/tests/*.h)
CUDA := $(wildcard benchmarks/gpu/*/*.cu tests/gpu/*.cc tests/gpu/*.h)

# A comma that does not separate the arguments of $(call).
, := ,

# $(call build_native,DIR,FLAGS,OPTIONS): the native tests in build/DIR, with the flags of the wheel and FLAGS.
build_native = $(BIN)/cmake --log-level=WARNING -S . -B build/$(1) -G Ninja \
	-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTANDEM_PYTHON=OFF -DTANDEM_NATIVE_TESTS=ON \
	-DCMAKE_CXX_FLAGS="$(2)" $(3) && $(BIN)/cmake --build build/$(1) -- --quiet
# $(call run_native,DIR,SECONDS): a test may take SECONDS, or 300.
run_native = $(BIN)/ctest --test-dir build/$(1) --output-on-failure --no-tests=error --timeout $(or $(2),300)

FOR_ARM := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	-DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static

.PHONY: help setup demo test check check-gpu soak check-arm format native sanitize tables clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(CSRC)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(INSTALLED)  ## create .venv and install tandemkv with its tools; redone when their sources change

demo: $(INSTALLED)  ## a number planted far back in a novel, then 128K tokens; stock transformers beside tandemkv
	$(BIN)/tandemkv demo

test: setup check  ## set up and check: what a change must pass

check: $(INSTALLED)  ## format, lint, types, layers, native tests, pytest; stops at the first failure
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(CSRC_TESTS) $(CUDA)
	$(MAKE) --no-print-directory native
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu

check-gpu: $(INSTALLED)  ## every variant of the GPU kernels, compiled for every architecture (tens of minutes)
	$(BIN)/python -m tests.gpu.every_variant

# OpenMP's threads sleep between ops: beside our own they would spin away the second core.
soak: $(INSTALLED)  ## random operations of many sequences beside stock for 5 minutes; memory stays flat
	GOMP_SPINCOUNT=0 $(BIN)/python -m tests.soak

format: $(INSTALLED)  ## format Python and C++, and apply ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) $(CSRC_TESTS) $(CUDA)

native: $(INSTALLED)  ## the native tests as they ship
	$(call build_native,native)
	$(call run_native,native)

# -O1 keeps the reports readable; the library's own -O3 follows it on the command line.
sanitize: $(INSTALLED)  ## the native tests under AddressSanitizer and UBSan, what uses threads under ThreadSanitizer
	$(call build_native,asan,-O1 -g1 -fno-omit-frame-pointer -fsanitize=address$(,)undefined -fno-sanitize-recover=all)
	$(call run_native,asan)
	$(call build_native,tsan,-O1 -g1 -fsanitize=thread)
	TSAN_OPTIONS=halt_on_error=1 build/tsan/worker_pool_test
	TSAN_OPTIONS=halt_on_error=1 build/tsan/driver_test
	TSAN_OPTIONS=halt_on_error=1 build/tsan/calls_test threads

# Nothing has to be installed for it where Debian's packages can be fetched (tools/arm-toolchain.sh). max has bf16 dot
# products, so that everything runs there; cortex-a57 has none: there the choice is checked, and one test that attends.
check-arm: $(INSTALLED)  ## the native tests built for Arm (NEON, with and without bf16) and run by qemu: 6 minutes
	tools=$$(tools/arm-toolchain.sh) && export PATH=$$tools:$$PATH && \
	$(call build_native,arm/native,,$(FOR_ARM)) && \
	QEMU_CPU=max TANDEM_EXPECT_ISA=neon_bf16 $(call run_native,arm/native,900) && \
	QEMU_CPU=cortex-a57 TANDEM_EXPECT_ISA=neon qemu-aarch64-static build/arm/native/attend_test instruction && \
	QEMU_CPU=cortex-a57 qemu-aarch64-static build/arm/native/calls_test runs

tables: $(INSTALLED)  ## README's tables of families and ways, from the tests that prove them
	$(BIN)/python -m pytest -q tests/integrations --write-tables

clean:  ## remove what was built, keep .venv
	rm -rf build dist $(INSTALLED)
