# make demo: the whole method on the embedded default; make test: the tests. Both install what they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
CLAIM := runs/claim
SEEDS := 0 1 2
SEARCH = $(BIN)/python data_generation.py --data_dir miniature/data --samples 60 --limit 120 --output_dir $(DEMO)/data
TRAIN = $(BIN)/python train.py --data $(DEMO)/data --output_dir $(DEMO)/checkpoints --warmup_steps 50
EVALUATE = PYTHON=$(BIN)/python ./eval.sh --data_dir miniature/data --labels $(DEMO)/data

.PHONY: demo demo-seeds claim test test-slow lint clean-demo

# The three steps, with fewer labels a set than the paper's so that two cores need minutes. Run again, it continues.
demo: $(VENV)/.installed
	$(SEARCH)
	$(TRAIN) --run_name demo
	$(EVALUATE) --output_dir $(DEMO)/results $(DEMO)/checkpoints/demo

# The same labels, routers of several training seeds: the table with their mean and spread.
demo-seeds: $(VENV)/.installed
	$(SEARCH)
	for seed in $(SEEDS); do $(TRAIN) --run_name seed$$seed --seed $$seed || exit; done
	$(EVALUATE) --output_dir $(DEMO)/seeds $(SEEDS:%=$(DEMO)/checkpoints/seed%)

# Routers beside controls, on 13,300 test questions of the embedded default and 2,800 of two further bases: about two hours.
claim: $(VENV)/.installed
	$(BIN)/python miniature/make.py questions --train 1900 --test 1900 --output_dir $(CLAIM)/questions
	$(BIN)/python data_generation.py --data_dir $(CLAIM)/questions --samples 300 --limit 800 --output_dir $(CLAIM)/labels
	$(BIN)/python -m drllm.claim --labels $(CLAIM)/labels --data_dir $(CLAIM)/questions --seeds 5 --oracle_questions 20 \
	  --batch_size 128 --work_dir $(CLAIM) --output $(CLAIM)/claim.json
	for base in plain qwen3; do \
	  $(BIN)/python data_generation.py --model miniature/$$base/model --data_dir miniature/data --samples 60 --limit 120 \
	    --output_dir $(CLAIM)/$$base/labels && \
	  $(BIN)/python -m drllm.claim --model miniature/$$base/model --labels $(CLAIM)/$$base/labels --seeds 5 \
	    --train_questions 400 --validation_questions 200 --static_questions 200 --oracle_questions 10 --batch_size 128 \
	    --work_dir $(CLAIM)/$$base --output $(CLAIM)/$$base.json || exit; \
	done

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
