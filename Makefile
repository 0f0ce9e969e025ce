# Every target works on a fresh clone: it makes .venv, installs saelab there, and runs. Needs python3 (3.11 or newer), git, make.
PYTHON ?= python3
SERVE ?= 1
PYTEST_ARGS ?=
# Two processes of one thread each: with several threads, tensors as small as the tests' only wait for each other.
TEST_PROCESSES ?= 2
DEMO_ARGS ?=

STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiling all that pip installs takes longer than installing it: --no-compile leaves that to the first import, which has
# to be allowed to keep what it compiled. What the dashboard's first page waits for is imported once at the end.
export PYTHONDONTWRITEBYTECODE :=
FIRST_PAGE := streamlit.web.bootstrap, pandas, altair, plotly.graph_objects

.PHONY: help install test lint bench demo mutants

help:
	@echo "make demo      train, evaluate and browse an SAE of a small language model (SERVE=0: do not serve the dashboard)"
	@echo "make test      all tests (PYTEST_ARGS='-k topk': some of them)"
	@echo "make lint      ruff format --check, ruff check, pyright"
	@echo "make bench     the benchmarks, as CSV rows on standard output"
	@echo "make mutants   break the code in every listed way and see that a test fails"
	@echo "make install   .venv with saelab and the tools of test, lint and mutants, which call it"

install: $(DEV_STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("saelab needs Python 3.11 or newer; say which with: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Installing saelab into .venv; the first time this takes some minutes."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --progress-bar off --no-compile -e . -c constraints.txt
	.venv/bin/python -c 'import $(FIRST_PAGE)'
	@touch $(STAMP)

$(DEV_STAMP): $(STAMP)
	.venv/bin/python -m pip install --progress-bar off --no-compile -e '.[dev]' -c constraints.txt
	@touch $(DEV_STAMP)

test: install
	@if [ -z "$$SAELAB_CHROMIUM" ] && ! command -v chromium > /dev/null 2>&1; then \
		echo "No Chromium found: the browser tests are skipped. To install it: apt-get install chromium (or set SAELAB_CHROMIUM)"; fi
	OMP_NUM_THREADS=1 python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=12 $(PYTEST_ARGS)

lint: install
	ruff format --check .
	ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright

bench: $(STAMP)
	python -m saelab.activation_cache.bench.harvest
	@for bench in kernels/bench/bench_*.py; do \
		[ -e "$$bench" ] || continue; \
		echo "$$bench"; python -m "saelab.kernels.bench.$$(basename "$$bench" .py)" || exit 1; done

demo: $(STAMP)
	saelab demo $(if $(filter 0,$(SERVE)),--no-serve) $(DEMO_ARGS)

mutants: install
	python tests/mutants/run.py
