# Everything a stranger needs: `make demo` and `make test` set up their own environment in .venv.
#   VENV=DIR     use or make another environment, for example VENV=$$VIRTUAL_ENV for the active one
#   PYTHON=EXE   the interpreter that makes the environment
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: help demo test bench lint docs format build wheel clean generate asan tsan valgrind fuzz soak mutate audit
help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed-train ## train, prune, freeze and time VGG-16 on handwritten digits (minutes)
	$(BIN)/iessp demo

# One OpenMP thread a worker: the workers already fill the cores.
test: $(VENV)/.installed-test ## install and run the tests; ARGS="-k name" goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

bench: $(VENV)/.installed-bench ## time the kernels against the dense baselines; ARGS goes to the benchmark
	$(BIN)/python -m bench $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, mypy, workflows, clang-format, clang-tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
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

wheel: ## the committed sources as a wheel, tested as installed and without a compiler; ARGS as for test
	PYTHON=$(PYTHON) tools/wheel build/wheel $(ARGS)

# What a night's run adds to `make test`; SECURITY.md says what each is for.
RUN = OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m
generate: $(VENV)/.installed-test ## 20,000 generated problems against the float64 oracle
	$(RUN) tests.generate --count 20000 --seed 10 --jobs 2 --record tests/records/generated.json $(ARGS)

asan: $(VENV)/.installed-test ## self-test, extension tests and 500 problems under the address and UB sanitizers
	$(RUN) tests.sanitized address

tsan: $(VENV)/.installed-test ## self-test with threads under the thread sanitizer
	$(RUN) tests.sanitized thread

valgrind: $(VENV)/.installed-test ## self-test under valgrind
	$(RUN) tests.sanitized valgrind

fuzz: $(VENV)/.installed-test ## ten minutes each: files to load, integers to the native boundary
	$(BIN)/pip install -c constraints.txt atheris
	$(RUN) tests.fuzz.load -max_total_time=600 build/fuzz/load
	$(RUN) tests.fuzz.native -max_total_time=600 build/fuzz/native

soak: $(VENV)/.installed-test ## ten minutes of mixed shapes with flat memory
	$(RUN) tests.soak --seconds 600 --record tests/records/soak.json

mutate: $(VENV)/.installed-test ## plants a fault of each class in a copy and shows which test notices
	$(RUN) tests.mutate --record tests/records/mutations.json
	$(RUN) tests.cuda.mutate --record tests/records/cuda-mutations.json

audit: $(VENV)/.installed-dev ## licences of what development installs, known vulnerabilities of what is pinned
	$(PYTHON) -m venv build/audit && build/audit/bin/pip install -q pip-audit pip-licenses
	build/audit/bin/pip-licenses --python $(BIN)/python --with-system --format=markdown --order=license
# What is pinned, not what is installed: torch's "+cpu" and this package are on no list. Without --strict pip-audit says
# "No known vulnerabilities found" of packages it could not look up.
	build/audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements-dev.txt
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

clean: ## remove what was built, and .venv
	rm -rf build dist *.egg-info stripe_kernels/*.so .venv

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Installing again after a change of the native code is incremental: the objects stay under build/.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt tools/install $(shell find csrc -type f)
	PYTHON=$(PYTHON) tools/install $(VENV) $*
	@touch $@
