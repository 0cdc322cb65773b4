# `make demo`, `make test` and `make test-clients` each do all of their own set-up; everything lives in .venv/ and build/.
# A step that fails leaves no stamp, so that the next call tries it again. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
ifeq ($(origin CC),default)
CC     = gcc
endif
# Where pip finds torch, for example the CPU index that pytorch.org names; empty: pip's own setting.
TORCH_INDEX ?=
# More arguments for pytest (make test PYTEST_ARGS="-k clip -x") and for the example (make demo DEMO_ARGS=...).
PYTEST_ARGS ?=
DEMO_ARGS   ?=

PY  = $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: help
help:
	@echo "demo      train the CIFAR-10 example on two ranks (sets everything up first)"
	@echo "test      run the test suite (sets everything up first); test-long adds what takes minutes"
	@echo "test-clients  Transformers, Accelerate and PEFT, unmodified, and a script for DeepSpeed, over the name deepspeed"
	@echo "build     set up $(VENV) and build the extension in place"
	@echo "compat    install the distribution that is called deepspeed into $(VENV)"
	@echo "lint      check C and Python style; format: apply it"
	@echo "asan      C tests and single-process Python tests under AddressSanitizer and UBSan"
	@echo "tsan      C tests under ThreadSanitizer"
	@echo "fuzz      fuzz the readers of checkpoint files for SECONDS (20) each"
	@echo "bench     measure against plain torch and DDP (and DeepSpeed where PEER names its python)"
	@echo "clean     remove build products; distclean: the environment too"

# ---- environment and extension ----

# python3 may be missing too, so nothing below is asked of it before this ran.
.PHONY: system
system:
	@sh tools/require_system.sh "$(PYTHON)" "$(CC)"

$(VENV)/.made: | system
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and alone: its index may be another one, and what follows must not replace it.
$(VENV)/.torch: constraints.txt $(VENV)/.made
	@echo "Installing torch (a few hundred megabytes the first time)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.packages: constraints.txt pyproject.toml $(VENV)/.torch
	$(PIP) $$($(PY) tools/requirements.py build-system.requires project.dependencies \
	    project.optional-dependencies.dev)
	touch $@

SOURCES := $(shell find csrc -name '*.[ch]' -o -name '*.def' 2>/dev/null) setup.py pyproject.toml

# Editable: the extension lands beside the Python files, and a change to those needs no build.
$(VENV)/.built: $(SOURCES) $(VENV)/.packages
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

.PHONY: build
build: $(VENV)/.built

# deepspeed_c under the name `deepspeed`, in the environment.
$(VENV)/.compat: $(wildcard compat/*.* compat/deepspeed/*.py) $(VENV)/.built
	$(PIP) --no-build-isolation --no-deps ./compat
	touch $@

.PHONY: compat
compat: $(VENV)/.compat

.PHONY: compile-commands
compile-commands: build

# ---- what a user runs ----

# Ten thousand images train in about a minute; where there are fewer, all of them are used.
DEMO_DATA := $(wildcard ../shared/data/cifar10)

.PHONY: demo
demo: build
	PATH="$(abspath $(VENV))/bin:$$PATH" examples/cifar10/run_ds.sh \
	    --train-samples 10000 $(if $(DEMO_DATA),--data-dir $(DEMO_DATA)) $(DEMO_ARGS)

.PHONY: test test-long
test: build
	$(PY) -m pytest -m "not long" $(PYTEST_ARGS)

test-long: build
	$(PY) -m pytest $(PYTEST_ARGS)

$(VENV)/.clients: constraints.txt pyproject.toml $(VENV)/.compat
	$(PIP) $$($(PY) tools/requirements.py project.optional-dependencies.clients)
	touch $@

.PHONY: test-clients
test-clients: $(VENV)/.clients
	$(PY) -m pytest tests/clients $(PYTEST_ARGS)

.PHONY: bench
bench: build
	PYTHON=$(abspath $(PY)) PEER=$(PEER) sh benchmarks/run.sh

# ---- style ----

$(VENV)/.lint: pyproject.toml constraints.txt $(VENV)/.made
	$(PIP) $$($(PY) tools/requirements.py project.optional-dependencies.lint)
	touch $@

C_FILES = $(shell find csrc tests/c tests/fuzz -name '*.[ch]')

.PHONY: lint format
lint: $(VENV)/.lint
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	$(VENV)/bin/ruff check .

format: $(VENV)/.lint
	$(VENV)/bin/clang-format -i $(C_FILES)
	$(VENV)/bin/ruff check --fix-only .

# ---- C tests: the core without Python; SAN=address,undefined or SAN=thread instruments them ----

SAN ?=
BIN := build/c$(if $(SAN),-$(SAN))
SANFLAGS := $(if $(SAN),-fsanitize=$(SAN) -fno-sanitize-recover=all -fno-omit-frame-pointer -O1)
CORE_C  := $(wildcard csrc/*.c csrc/comm/*.c csrc/kernels/*.c)
CORE_H  := $(wildcard csrc/*.h csrc/*.def csrc/comm/*.h csrc/kernels/*.h)
CFLAGS_CORE = -std=c11 -O3 -g -fno-math-errno -ffp-contract=off -pthread -Wall -Wextra -Werror \
              -Wno-missing-field-initializers -Icsrc $(shell pkg-config --cflags libcjson)
LIBS = $(shell pkg-config --libs libcjson) -lm -ldl -pthread
C_TESTS := $(patsubst tests/c/%.c,$(BIN)/%,$(wildcard tests/c/test_*.c))

.PHONY: c-tests
c-tests: $(C_TESTS)

$(BIN)/obj/%.o: csrc/%.c $(CORE_H)
	@mkdir -p $(dir $@)
	$(CC) $(CFLAGS_CORE) $(SANFLAGS) -c $< -o $@

$(BIN)/libdsc.a: $(patsubst csrc/%.c,$(BIN)/obj/%.o,$(CORE_C))
	@rm -f $@
	ar rcs $@ $^

$(BIN)/test_%: tests/c/test_%.c $(wildcard tests/c/*.h) $(BIN)/libdsc.a
	$(CC) $(CFLAGS_CORE) $(SANFLAGS) $< $(BIN)/libdsc.a $(LIBS) -o $@

# ---- fuzzing: readers of files, for SECONDS each; an input that fails stays in build/fuzz/*.failed ----

SECONDS ?= 20
FUZZ    := build/fuzz
FUZZERS := $(patsubst tests/fuzz/%.c,%,$(filter-out %_driver.c,$(wildcard tests/fuzz/fuzz_*.c)))
FUZZED  := $(patsubst csrc/%.c,$(FUZZ)/obj/%.o,$(wildcard csrc/json.c csrc/shard*.c csrc/manifest*.c))
FUZZFLAGS = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1
COVERAGE  = -fsanitize-coverage=trace-pc

.PHONY: fuzz fuzzers
fuzz: $(addprefix run-,$(FUZZERS))
fuzzers: $(addprefix $(FUZZ)/,$(FUZZERS))

.PHONY: $(addprefix run-,$(FUZZERS))
$(addprefix run-,$(FUZZERS)): run-%: $(FUZZ)/%
	$< $(SECONDS)

$(FUZZ)/obj/%.o: csrc/%.c $(CORE_H)
	@mkdir -p $(dir $@)
	$(CC) $(CFLAGS_CORE) $(FUZZFLAGS) $(COVERAGE) -c $< -o $@

$(FUZZ)/obj/%.o: tests/fuzz/%.c tests/fuzz/fuzz.h $(CORE_H)
	@mkdir -p $(dir $@)
	$(CC) $(CFLAGS_CORE) $(FUZZFLAGS) $(if $(findstring driver,$@),,$(COVERAGE)) -c $< -o $@

# What is not fuzzed comes from the library of the C tests.
$(addprefix $(FUZZ)/,$(FUZZERS)): $(FUZZ)/%: $(FUZZ)/obj/%.o $(FUZZ)/obj/fuzz_driver.o $(FUZZED) build/c/libdsc.a
	$(CC) $(FUZZFLAGS) $^ $(LIBS) -o $@

.PHONY: asan tsan
# `pytest`, not `python -m pytest`, which would put this folder and its own extension before build/asan/lib.
# Python itself is not instrumented, so the sanitizer's library must be there first, and its own leaks
# (interned objects) are not ours to report; the C tests do look for leaks. A small quarantine lets freed
# memory go back soon, which tests of memory use look at. Compilers before gcc 14 do not lock ASan's allocator
# across a fork, so that loader workers, forked beside torch's threads, sometimes wait in it for ever: not here.
FORKING = nothing_is_drawn_from_global_generators workers_draws_depend_on_seed_epoch_and_rank_only \
          state_counts_what_was_handed_over_not_what_workers_fetched
ASAN_LIBS = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libubsan.so)
asan: build
	DSC_TEST_SAN=address,undefined $(PY) -m pytest tests/test_c.py $(PYTEST_ARGS)
	DSC_SANITIZE=address,undefined $(PY) setup.py -q build --build-base build/asan \
	    --build-lib build/asan/lib --build-temp build/asan/temp
	LD_PRELOAD="$(ASAN_LIBS)" ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 PYTHONMALLOC=malloc \
	    PYTHONPATH=$(abspath build/asan/lib) DSC_EXPECT_CORE=$(abspath build/asan/lib) \
	    $(VENV)/bin/pytest -p no:cacheprovider -m "not ranks and not long" --ignore tests/test_c.py \
	    --ignore tests/rules --ignore tests/test_build.py --ignore tests/test_example.py \
	    --ignore tests/test_launcher.py \
	    $(FORKING:%=--deselect tests/test_dataloader.py::test_%) $(PYTEST_ARGS)

tsan: build
	DSC_TEST_SAN=thread $(PY) -m pytest tests/test_c.py $(PYTEST_ARGS)

.PHONY: clean distclean
clean:
	rm -rf build dist *.egg-info compat/build compat/*.egg-info compile_commands.json deepspeed_c/_core*.so
	rm -rf $(VENV)/.built examples/cifar10/out
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean
	rm -rf $(VENV)
