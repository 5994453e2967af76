# The front door. `make` lists the targets; each brings what it needs, on a fresh machine too.

TRANSPORT   ?= unix
DEST        ?=
EXPORT_ARGS ?=
PROFILE     ?= quick
OUT         ?=
RESULTS     ?= results
SANITIZE    ?=
PYTEST_ARGS ?=

comma  := ,
VENV   := .venv/bin/python
BUILD  := build$(if $(SANITIZE),/sanitize-$(subst $(comma),-,$(SANITIZE)))
# A path as one word of a command, whatever is in it; a shell that left ~/ as it is meant home.
home = $(if $(filter ~/%,$(1)),$(patsubst ~/%,$(HOME)/%,$(1)),$(1))
path = '$(subst ','\'',$(call home,$(1)))'
# One build at a time in a tree: the lock is on the directory itself, so nothing is left behind.
LOCKED := flock --close .make

# The tests and the demo look for the C++ programs here.
export IPC_BRIDGE_BUILD_DIR := $(CURDIR)/$(BUILD)

# Any finding ends the program that has it, and so fails its test.
ifneq ($(SANITIZE),)
export ASAN_OPTIONS  ?= detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS ?= halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS  ?= halt_on_error=1:second_deadlock_stack=1:suppressions=$(CURDIR)/tests/tsan.supp
endif

.DEFAULT_GOAL := help
.PHONY: help setup configure build known named demo bench report test model calibrate lint format clean distclean export docs

help:  ## list the targets
	@echo "usage: make TARGET [NAME=value]"; echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## install what is missing: system packages by apt, Python's into .venv
	@.make/setup

configure: setup
	@$(LOCKED) cmake -G Ninja -S . -B $(BUILD) -DIPC_BRIDGE_SANITIZE="$(SANITIZE)" >/dev/null

build: configure  ## build the C++ programs (SANITIZE=address,undefined or SANITIZE=thread)
	@$(LOCKED) cmake --build $(BUILD)

# The transports, from the map of URLs, and the short names: a wrong one shows before a long build.
SCHEMES = $(shell sed -n '/^SCHEMES/,/^}/s/^ *"\(.*\)":.*/\1/p' python/ipc_bridge/endpoint.py)
FAMILIES = $(sort $(foreach one,$(SCHEMES),$(firstword $(subst +, ,$(one)))))
KNOWN = $(SCHEMES) $(filter-out $(SCHEMES),$(FAMILIES)) all
known:
	@$(if $(and $(filter 1,$(words $(TRANSPORT))),$(filter $(KNOWN),$(TRANSPORT))),,\
	  echo "error: INVALID_ARGUMENT: unknown transport; known are $(KNOWN): $(TRANSPORT)" >&2; exit 2)

demo: known configure  ## show the four pairings talk over one transport (TRANSPORT=unix)
	@$(LOCKED) cmake --build $(BUILD) --target ipc-bridge-peer _native
	@$(VENV) -m ipc_bridge.harness.demo $(TRANSPORT)

bench: build  ## measure all transports and pairings (PROFILE=quick|full, OUT=DIR)
	@$(VENV) -m ipc_bridge.harness.cli bench --profile $(PROFILE) $(if $(OUT),--out $(call path,$(OUT)))

report: setup  ## make pictures and a page of the newest results (RESULTS=DIR, OUT=DIR)
	@$(VENV) -m ipc_bridge.harness.cli report $(if $(RESULTS),$(call path,$(RESULTS))) $(if $(OUT),--out $(call path,$(OUT)))

# A worker a core: most tests wait more than they compute, and each has a directory of its own.
test: build  ## run all tests (SANITIZE=..., PYTEST_ARGS='-k echo -x', or -n0: one at a time)
	@$(LOCKED) ctest --test-dir $(BUILD) --output-on-failure
	@$(VENV) -m pytest tests -n auto --dist worksteal $(PYTEST_ARGS)

model: setup  ## explore the shm ring's protocol with store buffers, and with each order taken away
	@$(VENV) tests/model_ring.py

calibrate: build  ## count false alarms and misses of `ipc-bridge compare` over many made runs
	@$(VENV) -m pytest tests/calibrate_compare.py -n auto $(PYTEST_ARGS)

named:
	@$(if $(DEST),,echo "error: INVALID_ARGUMENT: DEST=DIRECTORY is missing" >&2; exit 2)
	@$(if $(filter-out $(FAMILIES) all,$(or $(TRANSPORT),none)),\
	  echo "error: INVALID_ARGUMENT: unknown transport; known are $(FAMILIES) all: $(TRANSPORT)" >&2; exit 2)

export: named setup configure  ## copy a transport out (TRANSPORT=unix DEST=../mine EXPORT_ARGS='--name mine')
	@$(LOCKED) cmake --build $(BUILD) --target proto-python
	@$(VENV) -m ipc_bridge.harness.cli export $(TRANSPORT) $(call path,$(DEST)) $(EXPORT_ARGS)

MODULES = $(filter-out %_pb2 %_pb2_grpc %/load %/peer,$(basename $(wildcard \
	python/ipc_bridge/[a-z]*.py python/ipc_bridge/transports/[a-z]*.py)))

docs: setup configure  ## render the API reference of both languages into build/docs/
	@.make/setup docs
	@$(LOCKED) cmake --build $(BUILD) --target proto-python
	@$(LOCKED) sh -ec 'rm -rf build/docs; mkdir -p build/docs; doxygen docs/Doxyfile; \
	$(VENV) -m pdoc -o build/docs/python ipc_bridge $(subst /,.,$(patsubst python/%,%,$(MODULES)))'
	@echo "Python: build/docs/python/index.html   C++: build/docs/cpp/index.html"

CPP_FILES = $(shell find cpp tests -name '*.[ch]pp' 2>/dev/null)
MYPY_DIRS = $(wildcard python/ipc_bridge python/bare python/thermostat tests)

lint: configure  ## check style and types (ruff, mypy, clang-format)
	@$(LOCKED) cmake --build $(BUILD) --target proto-python
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m mypy $(MYPY_DIRS)
	$(if $(CPP_FILES),clang-format --dry-run -Werror $(CPP_FILES))

format: setup  ## rewrite the sources in the project's style
	$(VENV) -m ruff check --fix-only
	$(VENV) -m ruff format
	$(if $(CPP_FILES),clang-format -i $(CPP_FILES))

GENERATED = $(addprefix python/ipc_bridge/,*_pb2.py *_pb2.pyi *_pb2_grpc.py *.so)

clean:  ## remove what was built, and caches
	$(LOCKED) rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(GENERATED)
	find python tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv as well
	rm -rf .venv
