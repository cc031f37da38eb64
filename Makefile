# make demo   train and compare seven methods on real images, with nothing but Python ≥ 3.10 and make at hand
# make test   lint, types, tests
# make docs   the documentation as a site, in site/
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test docs clean

demo: .venv/.installed
	$(BIN)/longtail compare digits-lt --methods ce,la,ldam,paco,bcl,proco,gml --seeds 5 --jobs 2

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

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
