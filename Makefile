# Needs Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo demo-captioning test lint types clean help

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Teach a sentence encoder to see, and measure what it forgets
	$(BIN)/python -m recipes.image_text $(ARGS)

demo-captioning: $(VENV)/.demo ## Teach a small LLaVA to describe pictures with four methods, and measure what each forgets
	$(BIN)/python -m recipes.captioning $(ARGS)

test: $(VENV)/.dev ## Run the tests and the examples in the documentation
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

clean: ## Remove the environment and what runs wrote
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 …"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
