# `make demo` and `make test` do all their own set-up in .venv/.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The newest Python of 3.11 or later that is on the PATH; `make PYTHON=…` names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: help demo test cpp bench lint types check deps clean

help:
	@echo 'make demo   export the demo pair and edit photographs: out/bundle/, out/gallery.png'
	@echo 'make test   lint, types and all tests'
	@echo 'make cpp    the C++ runtime: build and tests, sanitizers, fuzzing, aarch64, Windows'
	@echo 'make bench  other ways to change weights per request, beside this one: out/bench/ (24 GB of memory, an hour)'
	@echo 'make deps   what needs root (compilers, Debian libraries)'
	@echo 'make clean  remove .venv/, out/, build/ and .sdk/'

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo 'No Python of 3.11 or later was found. Install one, or say make PYTHON=/path/to/python.' >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	touch $@

$(VENV)/.export: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export]'
	touch $@

$(VENV)/.test: $(VENV)/.export
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[rtx,cuda]' || test -z "$${CI:-}"
	touch $@

demo: $(VENV)/.export
	$(BIN)/hywu demo --out out

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

check: lint types

cpp: $(VENV)/.test
	tools/cpp.sh

bench: $(VENV)/.test
	mkdir -p out/bench
	$(BIN)/python -m bench --subject demo --subject 860m --subject generator --json out/bench/peers.json
	$(BIN)/python -m bench.report out/bench/peers.json --plots out/bench/plots

test: $(VENV)/.test check cpp
	$(BIN)/python -m pytest -n auto --dist worksteal

deps:
	./deps.sh

clean:
	rm -rf $(VENV) out build .sdk
