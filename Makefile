# Two commands on a fresh machine, with or without a GPU: `make demo` and `make test`.
# With VLLM=0.32 they use that version of vLLM, in an environment of its own.
PYTHON ?= python3
LATEST := 0.33
VLLM ?= $(LATEST)
SUFFIX := $(if $(filter $(LATEST),$(VLLM)),,-$(VLLM))
VENV := .venv$(SUFFIX)
CONSTRAINTS := constraints$(SUFFIX).txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The Triton of torch 2.11, for which the kernels are compiled too: see benchmarks/kernel_report.py.
OTHER_TRITON := .cache/triton-3.6.0
PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder  # the tests of a file share engines

# Of a release that is not the default one, what CI runs: scheduler, blocks, the real engine.
REDUCED := tests/engine/vllm_api tests/engine/test_patches.py tests/engine/test_spec.py tests/engine/cpu \
	$(patsubst %,tests/engine/scheduler/test_%.py,scheduling kv_cache kv_histories \
	scheduler_steps simulation) tests/engine/attention/test_prune.py \
	tests/engine/worker/test_poison.py tests/commands/test_canary.py \
	$(patsubst %,tests/end_to_end/test_%.py,engine engine_requests poison_engine sampling)

# Where `lint` reads docstrings: arguments begin with a noun, names are there, overrides say so.
DOCUMENTED := sparsemm_vllm triton_kernels head_profiles benchmarks tests/support

.PHONY: demo test reduced record lint slow

demo: $(INSTALLED)
	@$(BIN)/sparsemm demo

test: lint $(OTHER_TRITON)
	$(BIN)/pytest $(PROCESSES) -m "not slow"

reduced: $(INSTALLED)
	$(BIN)/sparsemm check --run
	$(BIN)/pytest $(PROCESSES) -m "not slow" $(REDUCED)

# Writes the result into benchmarks/results/compatibility and docs/compatibility.md.
record: lint $(OTHER_TRITON)
	@mkdir -p .cache
	-$(BIN)/pytest $(PROCESSES) -m "not slow" --junitxml=.cache/tests$(SUFFIX).xml \
		--ignore=tests/project/test_compatibility.py  # which looks at what is written here
	$(BIN)/python benchmarks/compatibility.py record --tests .cache/tests$(SUFFIX).xml
	$(BIN)/python benchmarks/compatibility.py table

slow: $(INSTALLED) $(OTHER_TRITON)
	$(BIN)/pytest $(PROCESSES) --hypothesis-profile new

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_docstrings.py $(DOCUMENTED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "Installing vLLM $(VLLM), torch and this project into $(VENV): 10 GB, some minutes, the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --disable-pip-version-check --progress-bar on -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(OTHER_TRITON): | $(INSTALLED)
	@$(BIN)/pip install --disable-pip-version-check --no-deps --no-compile --quiet \
		--target $@ triton==$(@:.cache/triton-%=%)
	@touch $@
