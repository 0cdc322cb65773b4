# make test and make demo each do all of their own set-up. Everything lives in build/ and .venv/.
PYTHON ?= python3
VENV   ?= .venv
CC     ?= gcc
CORE_C := $(wildcard csrc/*.c csrc/comm/*.c csrc/kernels/*.c)
CORE_H := $(wildcard csrc/*.h csrc/*.def csrc/comm/*.h csrc/kernels/*.h)
CFLAGS_CORE = -std=c11 -O3 -g -fno-math-errno -ffp-contract=off -pthread -Wall -Wextra -Werror \
              -Wno-missing-field-initializers -Icsrc $(shell pkg-config --cflags libcjson)
LIBS = $(shell pkg-config --libs libcjson) -lm -pthread
SAN ?=
BIN := build/c$(if $(SAN),-$(SAN))
SANFLAGS := $(if $(SAN),-fsanitize=$(SAN) -fno-sanitize-recover=all -fno-omit-frame-pointer -O1)

C_TESTS := $(patsubst tests/c/%.c,$(BIN)/%,$(wildcard tests/c/test_*.c))

.PHONY: c-tests
c-tests: $(C_TESTS)

$(BIN)/obj/%.o: csrc/%.c $(CORE_H)
	@mkdir -p $(dir $@)
	$(CC) $(CFLAGS_CORE) $(SANFLAGS) -c $< -o $@

$(BIN)/libdsc.a: $(patsubst csrc/%.c,$(BIN)/obj/%.o,$(CORE_C))
	@rm -f $@
	ar rcs $@ $^

$(BIN)/test_%: tests/c/test_%.c tests/c/case.h $(BIN)/libdsc.a
	$(CC) $(CFLAGS_CORE) $(SANFLAGS) $< $(BIN)/libdsc.a $(LIBS) -o $@
