# make demo: the whole method on the bundled toy model; make test: the tests. Both install what they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
COMPARE := runs/compare_methods
ABLATIONS := figure5 figure7 figure8 table6 teacher_forcing bias_init
SEEDS := 0 1 2
SEARCH = $(BIN)/python data_generation.py --data_dir miniature/data --samples 60 --limit 120 --output_dir $(DEMO)/data
TRAIN = $(BIN)/python train.py --data $(DEMO)/data --output_dir $(DEMO)/checkpoints --warmup_steps 50
EVALUATE = PYTHON=$(BIN)/python ./eval.sh --data_dir miniature/data --labels $(DEMO)/data

.PHONY: demo demo-seeds ablations compare_methods claim test test-slow lint clean-demo

# The three steps, with fewer labels per set than the paper's so that two cores need minutes. Run it again to resume.
demo: $(VENV)/.installed
	$(SEARCH)
	$(TRAIN) --run_name demo
	$(EVALUATE) --output_dir $(DEMO)/results $(DEMO)/checkpoints/demo

# The same labels, routers of several training seeds: the table with their mean and spread.
demo-seeds: $(VENV)/.installed
	$(SEARCH)
	for seed in $(SEEDS); do $(TRAIN) --run_name seed$$seed --seed $$seed || exit; done
	$(EVALUATE) --output_dir $(DEMO)/seeds $(SEEDS:%=$(DEMO)/checkpoints/seed%)

# Ablations of the training on the demo's labels, with as many epochs and warm-up steps as suit so few.
ablations: $(VENV)/.installed
	$(SEARCH)
	for name in $(ABLATIONS); do \
	  $(BIN)/python -m experiments.ablations $$name --data $(DEMO)/data --limit 100 --num_epochs 15 --warmup_steps 50 \
	    --work_dir $(DEMO)/ablations --output $(DEMO)/ablations || exit; \
	done

# Routers beside controls, on 13,300 test questions of the toy model and 2,800 of two further bases: about two hours.
claim: compare_methods
compare_methods: $(VENV)/.installed
	$(BIN)/python miniature/make.py questions --train 1900 --test 1900 --output_dir $(COMPARE)/questions
	$(BIN)/python data_generation.py --data_dir $(COMPARE)/questions --samples 300 --limit 800 --output_dir $(COMPARE)/labels
	$(BIN)/python -m experiments.compare_methods --labels $(COMPARE)/labels --data_dir $(COMPARE)/questions --seeds 5 \
	  --num_epochs 15 --warmup_steps 100 --oracle_questions 20 --batch_size 128 --work_dir $(COMPARE) \
	  --output $(COMPARE)/compare_methods.json
	for base in plain qwen3; do \
	  $(BIN)/python data_generation.py --model miniature/$$base/model --data_dir miniature/data --samples 60 --limit 120 \
	    --output_dir $(COMPARE)/$$base/labels && \
	  $(BIN)/python -m experiments.compare_methods --model miniature/$$base/model --labels $(COMPARE)/$$base/labels \
	    --seeds 5 --num_epochs 15 --warmup_steps 100 --train_questions 400 --validation_questions 200 \
	    --static_questions 200 --oracle_questions 10 --batch_size 128 \
	    --work_dir $(COMPARE)/$$base --output $(COMPARE)/$$base.json || exit; \
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
