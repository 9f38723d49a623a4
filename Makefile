# `make train` and `make test` set up what they need; the second run starts at once.
PYTHON ?= python3
OLDEST ?= python3.10
BIN := .venv/bin
DOCUMENTED := bvae bvae.metrics bvae.reference bvae.kernels bvae.pipelines

.DEFAULT_GOAL := help
.PHONY: help train test oldest bench gpu docs lint types clean

help:             ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]"
	@touch $@

train: .venv/installed  ## train on drawn faces; more options: make train ARGS="--amp --max-steps 500"
	$(BIN)/python -m bvae.train $(ARGS)

test: .venv/installed   ## the fast tests, on all cores; the slow ones too, as CI: make test ARGS='-m "not gpu"'
	$(BIN)/python -m pytest -n auto $(ARGS)

.venv-oldest/installed: setup.py pyproject.toml
	$(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]" "torch==2.11.*"
	@touch $@

oldest: .venv-oldest/installed  ## the tests with Python 3.10 and torch 2.11, the oldest supported; takes ARGS as test does
	.venv-oldest/bin/python -m pytest -n auto $(ARGS)

bench: .venv/installed  ## measure everything on this machine, write the record, rewrite the tables of README and docs
	$(BIN)/python -m pytest bench -v --record bench/results $(ARGS)
	$(BIN)/python -m bench.report

gpu: .venv/installed    ## everything that needs a GPU, stage by stage; some stages: make gpu ARGS="step-144 loader"
	$(BIN)/python -m bench.gpu $(ARGS)

docs: .venv/docs        ## the API reference, from the docstrings, as pages in build/docs
	$(BIN)/pdoc --docformat google --output-directory build/docs $(DOCUMENTED) $(ARGS)
	@echo "pages: $(CURDIR)/build/docs/index.html"

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train,dev,docs]"
	@touch $@

lint: .venv/installed types  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow bvae.__path__ to kernels/ and pipelines/: it reads links in the layout of an installation.
types: .venv/installed  ## mypy, on all that is installed
	@rm -rf build/types && mkdir -p build/types/bvae
	@ln -s "$(CURDIR)"/bvae/* "$(CURDIR)/kernels" "$(CURDIR)/pipelines" build/types/bvae
	@$(BIN)/mypy --package bvae --cache-dir build/mypy > build/types.txt; status=$$?; \
	sed -E -e 's,^build/types/,,' -e 's,^bvae/(kernels|pipelines)/,\1/,' build/types.txt; exit $$status

clean:            ## remove the environment and caches; runs/ and data/ stay
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
