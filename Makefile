# Everything here works with python3 (>= 3.11), make and a package index; `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo
TESTS ?=

# Interpreters in the order they are tried; each is run, because a name on PATH may be a shim that leads nowhere,
# and needs venv and ensurepip, which some distributions package apart. 3.11-3.13 first: those are tested.
CANDIDATES := $(PYTHON) python3 python3.13 python3.12 python3.11 python \
	/usr/local/bin/python3 /usr/bin/python3 /opt/homebrew/bin/python3 $(wildcard $(HOME)/.pyenv/versions/3.1[1-9]*/bin/python3)

define find_python
find_python() { \
	for limit in 14 99; do for candidate in $(CANDIDATES); do \
		if "$$candidate" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, $$limit))" >/dev/null 2>&1; \
		then echo "$$candidate"; return; fi; \
	done; done; \
	echo "error: no Python >= 3.11 with venv found (tried: $(strip $(CANDIDATES))); install one (Debian: python3 python3-venv) or say PYTHON=/path/to/python3" >&2; \
	return 1; }
endef

# pip's own settings (a mirror, a proxy's certificate) hold for uv as well.
define pip_index
index="$${UV_DEFAULT_INDEX:-$$($(BIN)/python -m pip config list 2>/dev/null | sed -n "s/^[^ ]*\.index-url='\(.*\)'$$/\1/p" | tail -n 1)}"; \
if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
export UV_SYSTEM_CERTS="$${UV_SYSTEM_CERTS:-true}" UV_LINK_MODE="$${UV_LINK_MODE:-copy}"
endef

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: install
install: $(STAMP)  ## .venv with everything, from pinned and hashed requirements

.PHONY: demo
demo: $(STAMP)  ## the whole journey on simulated scenes: cube, model, map (OUT=demo)
	@$(BIN)/terrashard demo --out "$(OUT)"

.PHONY: test
test: $(STAMP)  ## the whole test suite (TESTS="tests/cli -k walk" for a part)
	@# hundreds of processes are started: where Python may not write bytecode, each would parse its libraries anew, for 5 s
	@# three processes for two cores: while one waits for a server, a worker or a kill, the other two have the cores
	@# a process that crashes ends the run at once, with the test's name: pytest-xdist 3.8 starts another and can then wait without end
	@PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(CURDIR)/$(VENV)/pycache" $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -q $(TESTS)

.PHONY: check
check: $(STAMP)  ## format, lint, types, spelling, layers
	@$(MAKE) -j 2 --output-sync check-types check-rest

.PHONY: check-types check-rest
check-types: $(STAMP)
	$(BIN)/mypy --num-workers 2

check-rest: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache

.PHONY: format
format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(STAMP)  ## benchmarks with their peers in the same run (FULL=1: published sizes, SHOW=1: published figures; extra "bench")
	@$(BIN)/python benchmarks/run_all.py $(if $(FULL),--full) $(if $(SHOW),--show)

.PHONY: docs
docs: $(STAMP)  ## documentation pages in docs/_build/html
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

.PHONY: docs-figures
docs-figures: $(STAMP)  ## tables and figures of docs/survey.md, multimodal.md and placements.md (what was compiled before is kept)
	@$(BIN)/python benchmarks/planner_scaling.py
	@$(BIN)/python benchmarks/survey_page.py
	@$(BIN)/python benchmarks/multimodal_page.py

.PHONY: requirements
requirements: $(BIN)/uv  ## pin the newest releases anew (needs the package index)
	@$(pip_index); \
	for file in uv dev; do \
		source=$$([ $$file = uv ] && echo requirements/uv.in || echo "--extra dev --extra docs pyproject.toml"); \
		$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
			--upgrade --python-version 3.11 $$source -o requirements/$$file.txt; \
	done

.PHONY: clean
clean:  ## remove what make and the commands made, but not .venv
	rm -rf demo dist build docs/_build benchmarks/out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(find_python); python="$$(find_python)"; \
	echo "making $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))"; \
	"$$python" -m venv $(VENV)

$(BIN)/uv: requirements/uv.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

# uv first, for speed; pip with the same hashes where uv cannot (an index or proxy that only pip is set up for).
$(STAMP): requirements/dev.txt pyproject.toml $(BIN)/uv
	@echo "installing pinned requirements"
	@$(pip_index); \
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/dev.txt \
		|| { echo "uv could not; trying pip" >&2; $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	@touch $@
