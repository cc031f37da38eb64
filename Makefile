# make demo      train and compare seven methods on real images, with nothing but Python ≥ 3.10 and make at hand
# make test      lint, types, and the tests but for those marked slow
# make test-all  lint, types, all tests
# make docs      the documentation as a site, in site/
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-all lint docs clean

demo: .venv/.installed
	$(BIN)/longtail compare digits-lt --methods ce,la,ldam,paco,bcl,proco,gml --seeds 5 --jobs 2

test: lint
	$(BIN)/pytest -n 2 -m "not slow"

test-all: lint
	$(BIN)/pytest -n 2

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/zensical build --strict

# installed once, and again when what is to be installed has changed
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .hypothesis
