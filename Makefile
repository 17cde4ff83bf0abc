# make demo: the whole method on the embedded default; make test: the tests. Both install what they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test test-slow lint clean-demo

# The three steps, with fewer labels a set than the paper's so that two cores need minutes. Run again, it continues.
demo: $(VENV)/.installed
	$(BIN)/python data_generation.py --data_dir miniature/data --samples 60 --limit 120 --output_dir $(DEMO)/data
	$(BIN)/python train.py --data $(DEMO)/data --run_name demo --output_dir $(DEMO)/checkpoints --warmup_steps 50
	PYTHON=$(BIN)/python ./eval.sh $(DEMO)/checkpoints/demo --data_dir miniature/data --labels $(DEMO)/data \
	  --output_dir $(DEMO)/results

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean-demo:
	rm -rf $(DEMO)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; say which one to use with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed
