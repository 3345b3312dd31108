# `make demo` and `make test` need Python >= 3.11 and nothing else; both install what they use into $(VENV) once.
PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
# An environment with the oldest versions that setup.py allows: 6 GB with the torch of 2025.
OLDEST ?= .venv-oldest
OLDEST_TESTS ?= tests/laws tests/models tests/objectives tests/regularizers tests/losses tests/schedulers tests/pipelines
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1
PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check

.PHONY: demo test test-slow test-oldest lint api links docs clean distclean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/eqvae demo --output_dir runs/demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(OFFLINE) $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) $(TEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(OFFLINE) $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) -m "slow and not gpu and not hub" $(TEST_ARGS)

test-oldest: $(OLDEST)/.installed
	$(OFFLINE) $(OLDEST)/bin/python -m pytest -n $(TEST_WORKERS) $(OLDEST_TESTS) $(TEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

api: $(VENV)/.installed-dev
	$(VENV)/bin/python -m tests.test_api

links: $(VENV)/.installed-dev
	$(VENV)/bin/python -m tests.test_docs

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "'$(PYTHON)' was not found. Install Python >= 3.11, or name one: make PYTHON=/path/to/python3.11 demo"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.11 demo"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || \
		{ echo "'$(PYTHON)' cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

# Installed again only when setup.py changes. The dev extra contains the demo extra.
$(VENV)/.installed-demo: setup.py | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: setup.py | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[dev]"
	@touch $(VENV)/.installed-demo $@

$(VENV)/.installed-docs: setup.py | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# No cache: nothing else here ever asks for these versions.
$(OLDEST)/.installed: setup.py
	"$(PYTHON)" -m venv "$(OLDEST)"
	grep -oE '[A-Za-z_-]+>=[0-9.]+' setup.py | sed 's/>=/==/' >"$(OLDEST)/constraints.txt"
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --no-cache-dir -e ".[dev]" -c "$(OLDEST)/constraints.txt"
	@touch $@

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests training pipelines benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$(VENV)" "$(OLDEST)" src/*.egg-info
