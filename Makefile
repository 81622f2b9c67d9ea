# Every target builds `.venv` by itself. The stamps in `.venv` are written after the last step of an install
# has succeeded, so an interrupted one starts again; with a stamp newer than pyproject.toml nothing is asked
# of the network.
#
#   make PYTHON=python3.13 test        another interpreter (for a new .venv)
#   make test ARGS="-k conv_adapter"   more words for the command behind the target

VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?=
ARGS   ?=

# torch and torchvision are built for each other. Where the pair is pinned it is one that was tested together;
# elsewhere pip finds the newest pair that pyproject.toml allows.
PLATFORM := $(shell uname -s)-$(shell uname -m)
ifeq ($(PLATFORM),Linux-x86_64)
TORCH := torch==2.14.1 torchvision==0.29.1
else ifeq ($(PLATFORM),Linux-aarch64)
TORCH := torch==2.9.1 torchvision==0.24.1
else
TORCH := torch torchvision
endif

# What only tests read: labelled photographs (foolbox) and CLIP's vocabulary (open-clip-torch). Like the wheels of
# the `demo` extra they come without the dependencies that the packages declare, none of which reading a file needs.
TEST_WHEELS := foolbox==3.3.4 open-clip-torch==3.3.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets may want the same .venv: pip must not run twice at once.
.NOTPARALLEL:
.PHONY: help demo test lint format bench docs clean distclean

help: ## show this list
	@echo "torchgraft: one frozen backbone, many small tasks"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "The first run installs PyTorch into $(VENV) (some gigabytes); later runs start at once."

demo: $(VENV)/.demo ## train adapters on real weights and real pictures, in minutes, on a CPU
	@$(VENV)/bin/torchgraft demo $(ARGS)

test: $(VENV)/.dev ## run the test suite, without the tests marked slow
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 -m "not slow" $(ARGS)

lint: $(VENV)/.dev ## ruff check, ruff format --check, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## let ruff repair and format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev ## run every benchmark of benchmarks/
	@for script in benchmarks/*.py; do \
	  echo "== $$script"; OMP_NUM_THREADS=1 $(PY) "$$script" $(ARGS) || exit 1; \
	done

docs: $(VENV)/.docs ## regenerate the reference pages and build the site into site/
	$(PY) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## remove caches and built files; keeps .venv and runs/
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

# The first interpreter that is new enough and can make virtual environments; what was found otherwise is
# told in one line.
$(PY):
	@found=; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
	  version=$$($$candidate -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  found="$$found $$candidate ($$version)"; \
	  $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "creating $(VENV) with $$candidate ($$version)"; \
	  exec $$candidate -m venv --clear $(VENV); \
	done; \
	echo "torchgraft needs Python 3.11 or newer with its venv module; found:$${found:- none}." \
	  "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1

# $(call install,EXTRA): this checkout, editable, with an extra of pyproject.toml. The first line mends a
# .venv whose making was interrupted.
define install
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
	@echo "installing torchgraft$(1) into $(VENV); the first time this downloads PyTorch"
	@$(PY) -m pip install --disable-pip-version-check $(TORCH) -e '.$(1)'
endef

# $(call wheels,EXTRA WORDS): the packages of the `demo` extra, as pyproject.toml names them, without
# dependencies.
define wheels
	@$(PY) -m pip install --disable-pip-version-check --no-deps $(1) $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["demo"])')
endef

$(VENV)/.demo: pyproject.toml $(PY)
	$(call install)
	$(call wheels)
	@touch $@

$(VENV)/.dev: pyproject.toml Makefile $(PY)
	$(call install,[dev])
	$(call wheels,$(TEST_WHEELS))
	@touch $@

$(VENV)/.docs: pyproject.toml $(PY)
	$(call install,[docs])
	@touch $@
