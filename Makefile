# Everything a clean clone needs: python3 (3.11 or newer) with its venv module, make, and for `peers` a C++ compiler.
# Every target sets up what it stands on.

MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CACHE := $(if $(APRJAX_CACHE),$(APRJAX_CACHE),$(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/aprjax)
# `make setup CONSTRAINTS=` takes the newest release of everything instead of the tested ones.
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
# Most of the quick tests wait for a compiler that uses one core. A file stays in one process, for its fixtures.
PYTEST_WORKERS ?= 2
# On real models as well: while one process compiles, which takes one core, the other computes.
PYTEST_REAL_WORKERS ?= 2

# The plain build: batch- and thread-invariant, no repacked weights, no tinyBLAS, and no instructions
# beyond AVX2, so it is the oracle that gives the same bits on every x86-64 machine of the last ten years.
LLAMA_VERSION := 0.3.36
LLAMA_OPTIONS := -DGGML_NATIVE=OFF -DGGML_CPU_REPACK=OFF -DGGML_LLAMAFILE=OFF
LLAMA_WHEELS := $(CACHE)/wheels/llama-cpp-python-$(LLAMA_VERSION)-plain
# The other builds differ from the plain one in libggml-cpu alone, so only that is compiled (a minute or two).
# `default` is what `pip install llama-cpp-python` gives: its bits hang on the processor that it was compiled on. `avx2` is
# the same without instructions beyond AVX2: its bits are the same everywhere, so exactness is tested against it.
LLAMA_BUILDS := $(CACHE)/llama.cpp-$(LLAMA_VERSION)
LLAMA_OPTIONS_default := -DGGML_NATIVE=ON
LLAMA_OPTIONS_avx2 := -DGGML_NATIVE=OFF
LLAMA_PARTS := $(foreach part,COMMON TESTS TOOLS EXAMPLES SERVER,-DLLAMA_BUILD_$(part)=OFF)

MODELS := qwen2.5-coder-0.5b qwen2.5-coder-1.5b
FAULT ?= gate-up-swapped

.PHONY: help setup peers models test test-real lint demo demo-real docs notebooks bench clean

help:
	@echo "setup      .venv with aprjax (editable) and the tools for developing it"
	@echo "peers      llama.cpp in three builds (once, about 10 minutes), transformers and torch beside it"
	@echo "models     fetches $(MODELS)"
	@echo "test       the quick tests"
	@echo "test-real  the tests on real models and peers, and those that compile for minutes"
	@echo "lint       ruff and pyright"
	@echo "demo       plants a fault in the model that aprjax carries, and finds it (FAULT=chatml-row: another)"
	@echo "demo-real  the same with Qwen2.5-Coder-0.5B, which is fetched"
	@echo "docs       the documentation, as pages"
	@echo "notebooks  executes the notebooks, and writes their outputs in place"
	@echo "bench      the benchmarks; tables and plots go to benchmarks/results"
	@echo "clean      removes what the targets made here, but not $(CACHE)"

INSTALLED_FROM := pyproject.toml aprjax/front_door.py aprjax/front_door.pth $(CONSTRAINTS)
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "error: $(PYTHON) is older than Python 3.11; likely fix: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(PIP) install --quiet --editable '$(1)' $(addprefix --constraint ,$(CONSTRAINTS))
endef

setup: $(BIN)/.setup-done
$(BIN)/.setup-done: $(INSTALLED_FROM)
	$(call install,.[dev])
	@touch $@ $(BIN)/.package-done

# Without the tools for developing it: what `demo` needs, in half the time.
$(BIN)/.package-done: $(INSTALLED_FROM)
	$(call install,.)
	@touch $@

# Two that build into one cache at once would remove each other's half-built folders: the second waits.
WAIT_FOR_OTHERS := $(shell command -v flock >/dev/null 2>&1 && echo flock $(CACHE)/.peers.lock)
peers: $(BIN)/.setup-done
	@mkdir -p $(CACHE)
	@$(WAIT_FOR_OTHERS) $(MAKE) $(BIN)/.peers-done
$(BIN)/.peers-done: $(BIN)/.setup-done $(LLAMA_WHEELS)/.built $(LLAMA_BUILDS)/default/.built $(LLAMA_BUILDS)/avx2/.built
	# Local files and other indices have CPU builds; plain torch may bring gigabytes of CUDA, so it comes last.
	$(PIP) install --quiet 'torch==2.13.0+cpu' 2>/dev/null \
		|| $(PIP) install --quiet 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
		|| $(PIP) install --quiet 'torch==2.13.0'
	$(PIP) install --quiet transformers accelerate $(addprefix --constraint ,$(CONSTRAINTS))
	$(PIP) install --quiet --force-reinstall --no-deps $(LLAMA_WHEELS)/*.whl
	$(PIP) install --quiet llama-cpp-python==$(LLAMA_VERSION) $(addprefix --constraint ,$(CONSTRAINTS))
	@touch $@

# pip's own cache would hand out a wheel built with other options: it knows the version, not CMAKE_ARGS.
$(LLAMA_WHEELS)/.built: | $(BIN)/.setup-done
	rm -rf $(LLAMA_WHEELS).partial && mkdir -p $(LLAMA_WHEELS).partial
	CMAKE_ARGS="$(LLAMA_OPTIONS)" $(PIP) wheel --quiet --no-deps --no-cache-dir --no-binary llama-cpp-python \
		--wheel-dir $(LLAMA_WHEELS).partial llama-cpp-python==$(LLAMA_VERSION)
	touch $(LLAMA_WHEELS).partial/.built
	rm -rf $(LLAMA_WHEELS) && mv $(LLAMA_WHEELS).partial $(LLAMA_WHEELS)

$(LLAMA_BUILDS)/source/.unpacked: | $(BIN)/.setup-done
	rm -rf $(@D).partial && mkdir -p $(@D).partial
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D).partial llama-cpp-python==$(LLAMA_VERSION)
	tar -xzf $(@D).partial/*.tar.gz --strip-components=1 -C $(@D).partial && rm $(@D).partial/*.tar.gz
	touch $(@D).partial/.unpacked
	rm -rf $(@D) && mv $(@D).partial $(@D)

# Beside the new library lie the plain build's others, so that the folder is one for LLAMA_CPP_LIB_PATH.
$(LLAMA_BUILDS)/%/.built: $(LLAMA_BUILDS)/source/.unpacked $(LLAMA_WHEELS)/.built
	rm -rf $(@D).partial && mkdir -p $(@D).partial
	command -v cmake >/dev/null || $(PIP) install --quiet cmake
	set -e; export PATH="$$PATH:$(abspath $(BIN))"; \
	cmake -S $(<D)/vendor/llama.cpp -B $(@D).partial/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON $(LLAMA_PARTS) \
		-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$$ORIGIN' $(LLAMA_OPTIONS_$*) \
		>$(@D).partial/cmake.log; \
	cmake --build $(@D).partial/build --target ggml-cpu --parallel $$(nproc 2>/dev/null || echo 2) >>$(@D).partial/cmake.log
	$(BIN)/python -m zipfile -e $(LLAMA_WHEELS)/*.whl $(@D).partial/wheel
	cp $(@D).partial/wheel/llama_cpp/lib/lib* $(@D).partial/
	for library in $(@D).partial/libggml-cpu*; do cp -L $(@D).partial/build/bin/$$(basename $$library) $$library || exit 1; done
	rm -rf $(@D).partial/wheel $(@D).partial/build && touch $(@D).partial/.built
	rm -rf $(@D) && mv $(@D).partial $(@D)

models: $(BIN)/.setup-done
	set -e; for model in $(MODELS); do $(BIN)/python -m aprjax fetch $$model; done

test: setup
	$(BIN)/python -m pytest -q -m "not real_model and not thorough" -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-real: peers models
	APRJAX_REQUIRE_MODELS=1 APRJAX_REQUIRE_PEERS=1 $(BIN)/python -m pytest -q -m "real_model or thorough" \
		-n $(PYTEST_REAL_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: $(BIN)/.package-done
	@$(BIN)/python -m bisect demo --fault $(FAULT) --out out/demo

# Exit code 1 is what this is for: a divergence is planted and must be found.
demo-real: DEMO := out/demo-real
demo-real: $(BIN)/.package-done
	@set -e; mkdir -p $(DEMO); \
	model=$$($(BIN)/python -m aprjax fetch qwen2.5-coder-0.5b); \
	$(BIN)/python -m aprjax convert "$$model" $(DEMO)/clean.apr --keep-blocks; \
	$(BIN)/python benchmarks/faults/plant.py $(DEMO)/clean.apr $(DEMO)/faulty.apr --fault gate-up-swapped; \
	rm $(DEMO)/clean.apr; \
	code=0; $(BIN)/python -m bisect layers --model $(DEMO)/faulty.apr --ref "$$model" --prompt "What is 2+2?" \
		--report $(DEMO)/report || code=$$?; \
	if [ $$code -ne 1 ]; then echo "error: the planted fault was not found (exit code $$code)" >&2; exit 1; fi
	@echo "The planted fault was found. The report: $(DEMO)/report/index.html"

# mkdocs-material announces mkdocs 2, which it will not support; the version here is held below it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The documentation: out/site/index.html"

notebooks: setup
	$(BIN)/python -m aprjax fetch qwen2.5-coder-1.5b
	$(BIN)/python notebooks/execute.py

bench: peers models
	@missed=0; for script in $(wildcard benchmarks/bench_*.py); do \
		echo "== $$script"; $(BIN)/python $$script || missed=1; done; exit $$missed

clean:
	rm -rf $(VENV) out dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
