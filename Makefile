# Needs make and Python 3.10 or newer; everything else goes into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format train-demo bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(STAMP) ## make .venv with everything that building, running and testing need

# torch first and alone: the pinned build decides what the exporters beside it resolve to.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[export,onnxruntime,dev]"
	touch $@

demo: $(STAMP) ## build the demo model dense and pruned, draw demo/out/sheet.png, print the speed ratio
	$(BIN)/python -m demo.sheet

test: $(STAMP) ## run the tests; those that need a GPU skip themselves where there is none
	$(BIN)/python -m pytest --quiet

lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

train-demo: $(STAMP) ## train the demo model anew: about two hours on two cores, resumes where it stopped
	$(BIN)/python -m demo.train

bench: $(STAMP) ## time dense against pruned, alternating; writes JSON to profiling/results
	$(BIN)/python -m demo.bench

clean: ## remove .venv, caches and everything made by the demo
	rm -rf $(VENV) demo/out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
