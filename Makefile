# `make demo` and `make test` come first. Each target sets up all it needs in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FEDERATED := $(VENV)/federated

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test style docs notebooks clean

help: ## Lists the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Flower wants older versions of some packages than all else is tested with: an environment on top of the first, whose
# packages and pip it sees.
$(FEDERATED)/.installed: $(STAMP) constraints-federated.txt
	$(BIN)/python -m venv --clear --without-pip $(FEDERATED)
	site=$$($(FEDERATED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && $(BIN)/python -c \
		"import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" > $$site/main.pth
	$(FEDERATED)/bin/python -m pip install --quiet --constraint constraints-federated.txt 'hf-freeze[federated]'
	touch $@

demo: $(STAMP) ## Fine-tunes the embedded BERT on the embedded news in four ways, and compares them
	$(BIN)/hf-freeze demo

test: $(STAMP) $(FEDERATED)/.installed ## Runs all that CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(FEDERATED)/bin/python -m pytest -q tests/test_federated.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

style: $(STAMP) ## Formats, and mends what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Builds the manual in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

notebooks: $(STAMP) ## Runs the notebooks anew and keeps their outputs
	$(BIN)/jupyter execute --inplace --NotebookClient.record_timing=False notebooks/*.ipynb

clean: ## Removes what the other targets made
	rm -rf $(VENV) outputs notebooks/outputs docs/_build docs/notebooks .pytest_cache .mypy_cache .ruff_cache .hypothesis
