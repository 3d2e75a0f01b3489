# `make book` and `make test` need Python 3.11 or newer, and nothing else: both use one
# environment, .venv, which is made again when pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
# The stamp's name carries a checksum of pyproject.toml: new content, new install.
ENV := .venv/.installed-$(shell cksum < pyproject.toml | cut -d ' ' -f 1)

# Every notebook and many tests start a Python of their own; where this is set, as in many
# containers, each would spend ten seconds compiling all of torch again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env book test coursework grade lint bench clean

help:   ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

env: $(ENV) ## make .venv with the package, the book's tools and the tests' tools

book: $(ENV) ## run the notebooks that changed, build the book, print where it is
	$(BIN)/python book/build.py

test: $(ENV) ## run all tests; after `make book` they also open every page
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

coursework: $(ENV) ## build the sheets: students' copies, solutions, autograders
	$(BIN)/python notebooks/coursework/assign.py $(SHEET)

# Also OUT=points.csv, MINUTES=5 and MEMORY=4 (GiB) for each, TRUST=yes.
grade: $(ENV) ## grade notebooks: make grade SHEET=noise SUBMISSIONS=folder
	$(if $(and $(SHEET),$(SUBMISSIONS)),,$(error Say what to grade: make grade SHEET=noise \
	  SUBMISSIONS=folder))
	@$(BIN)/python notebooks/coursework/grade.py $(SHEET) "$(SUBMISSIONS)" \
	  $(if $(OUT),--out "$(OUT)") $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(MEMORY),--memory $(MEMORY)) $(if $(filter yes,$(TRUST)),--trust)

lint: $(ENV) ## check style and format, notebooks included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(ENV) ## images per second: bare training steps against training.py
	$(BIN)/python tests/bench.py

clean: ## remove the environment and everything built
	rm -rf .venv _build .pytest_cache .ruff_cache nlhelpers.egg-info

$(ENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This book needs Python 3.11 or newer, which '$(PYTHON)' is not: "; \
	  $(PYTHON) --version; \
	  echo "Name another one:  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@echo "Making the environment .venv; PyTorch is large, so this takes a few minutes"
	@$(PYTHON) -m venv .venv
	@# Without --no-compile pip spends a minute on files that are never imported.
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
	  -e ".[book,test]"
	@rm -f .venv/.installed-*
	@touch $@
