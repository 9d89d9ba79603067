# Everything a stranger needs: `make demo` and `make test` set up their own environment in .venv.
#   VENV=DIR     use or make another environment, for example VENV=$$VIRTUAL_ENV for the active one
#   PYTHON=EXE   the interpreter that makes the environment
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: help demo test bench lint docs format build clean
help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed-train ## train, prune, freeze and time VGG-16 on handwritten digits (minutes)
	$(BIN)/iessp demo

# One OpenMP thread a worker: the workers already fill the cores.
test: $(VENV)/.installed-test ## install and run the tests; ARGS="-k name" goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

bench: $(VENV)/.installed-bench ## time the kernels against the dense baselines; ARGS goes to the benchmark
	$(BIN)/python -m bench $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, mypy, clang-format, clang-tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	tools/tidy $(VENV)

docs: $(VENV)/.installed-dev ## build the documents into build/site
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: ## compile the extensions in place with the active environment's python: quick, incremental
	$(PYTHON) setup.py build_ext --inplace

clean: ## remove what was built, and .venv
	rm -rf build dist *.egg-info stripe_kernels/*.so .venv

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Installing again after a change of the native code is incremental: the objects stay under build/.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt tools/install $(shell find csrc -type f)
	PYTHON=$(PYTHON) tools/install $(VENV) $*
	@touch $@
