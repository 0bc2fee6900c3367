# Needs make and Python 3.10 or newer; everything else goes into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
# TensorRT-RTX has packages for these machines; its tests skip on others.
comma := ,
RTX := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)tensorrt-rtx)
# Without what they depend on: the libraries themselves, which NVIDIA's own index alone has.
STUBS := tensorrt-stubs==10.13.0.35.1
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= torch==2.13.0
GPU_VENV := .venv-gpu
RAY_VENV := .venv-ray
RAY_STAMP := $(RAY_VENV)/.installed
CAPABILITY := sm90
LOWEST_VENV := .venv-lowest
LOWEST_BUNDLE := $(LOWEST_VENV)/bundle

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-growth test test-slow test-browser test-ray test-ray-slow test-comfyui test-lowest test-cuda lint format train-demo bench bench-demo bench-batches bench-lossy bench-scaling bench-upscale train-var var-tradeoff inpaint-var tune-demo precisions gpu gpu-bench gpu-pack docs torture clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP) ## make .venv with everything that building, running and testing need

# torch first and alone: the pinned build decides what the exporters beside it resolve to.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[export,onnxruntime,nvml,dev$(RTX)]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(STUBS)
	touch $@

demo: $(STAMP) ## build the demo model dense and pruned, draw demo/out/sheet.png, print the speed ratio; SIZE=512
	$(BIN)/python -m demo.sheet $(if $(SIZE),--side $(SIZE))

demo-growth: $(STAMP) ## draw demo/out/scales.png, an image scale by scale with the tokens that are kept, and growing.webp; SIZE=512
	$(BIN)/python -m demo.growth $(if $(SIZE),--side $(SIZE))

# A process for every core; who is done takes over half of what another has left.
PYTEST := $(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(STAMP) ## run the tests but the slow ones; those that need a GPU skip themselves where there is none
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) ## run the slow tests: compilations, processes of their own, the wheel in an environment without torch
	$(PYTEST) -m "slow and not browser"

# playwright drives the Chromium that is there: it downloads none.
test-browser: $(STAMP) ## the server's page in Chromium: what it draws and tells, how it looks, and axe-core's rules
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[browser]"
	$(PYTEST) -m browser

# One ComfyUI for all of them: the tests run in one process.
test-comfyui: $(STAMP) ## the nodes in a real ComfyUI: COMFYUI_DIR=FOLDER, COMFYUI_PYTHON=its Python
	@test -n "$(COMFYUI_DIR)" || { echo "COMFYUI_DIR does not say where a ComfyUI is"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[browser]"
	$(BIN)/python -m pytest --quiet tests/integrations/comfyui

# Ray takes about 0.9 GB. Its tests run alone: a cluster that starts on a busy machine gives up.
$(RAY_STAMP): pyproject.toml
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RAY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[export,onnxruntime,serve,ray]" pytest filelock openai hypothesis
	touch $@

RAY_PYTEST := $(RAY_VENV)/bin/python -m pytest --quiet --show-capture=no --disable-warnings

test-ray: $(RAY_STAMP) ## drawing and serving on Ray, in an environment of their own
	$(RAY_PYTEST) -m "ray and not slow" tests/ray

test-ray-slow: $(RAY_STAMP) ## there too: ten processes killed where test-ray kills two, and a link that stays down for long
	$(RAY_PYTEST) -m "ray and slow" tests/ray

# Its engines are made with the onnxruntime that is to run them: of the environment only that package is put before ours.
test-lowest: $(STAMP) ## the runtime, without torch, on the oldest packages that it admits: constraints/lowest.txt
	rm -rf $(LOWEST_VENV)
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/lowest.txt ".[onnxruntime,hub]"
	mkdir $(LOWEST_VENV)/before
	ln -s "$$(echo $(CURDIR)/$(LOWEST_VENV)/lib/python*/site-packages/onnxruntime)" $(LOWEST_VENV)/before/onnxruntime
	PYTHONPATH=$(LOWEST_VENV)/before $(BIN)/python -m fastvar.cli build demo/checkpoint --size 256x256 --guidance off --out $(LOWEST_BUNDLE)
	$(LOWEST_VENV)/bin/python tests/lowest_versions.py $(LOWEST_BUNDLE)

# The CUDA build of torch takes 5 GB. It comes from PyPI, whatever folders of wheels pip is told of besides.
test-cuda: ## engines compiled for GPUs that are not there, and run on their stand-in; Linux, a CUDA toolkit; CUDA_TORCH=torch==2.11.0
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null $(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(CUDA_TORCH)"
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[export,onnxruntime,nvml,dev]"
	$(CUDA_VENV)/bin/python -m pytest --quiet tests/cuda -rA

# mypy knows the package by its name, which the checkout's folder need not have.
lint: $(STAMP) ## ruff and mypy
	mkdir -p build/source && ln -sfn ../.. build/source/fastvar
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

train-demo: $(STAMP) ## train the demo model anew into demo/out/training: about half a day on two cores, resumes where it stopped
	$(BIN)/python -m demo.training

bench: $(STAMP) ## engines against eager torch in turn, demo and a 125 M model; quiet machine, 12 minutes; BENCH=--prepare builds before; JSON to benchmarks/results
	$(BIN)/python -m benchmarks $(BENCH)

bench-demo: $(STAMP) ## the demo's engines, dense against pruned, scale by scale; writes JSON to benchmarks/results
	$(BIN)/python -m demo.measuring.speed

bench-batches: $(STAMP) ## milliseconds an image in passes of 1, 2 and 4; JSON, and the table in docs/benchmarks.md; BENCH=OPTIONS
	$(BIN)/python -m benchmarks.batches --docs docs/benchmarks.md $(BENCH)

bench-lossy: $(STAMP) ## speed, accuracy and likeness of every lossy option on the demo, in one run; JSON to benchmarks/results
	$(BIN)/python -m demo.measuring.lossy

train-var: $(STAMP) ## train a small class-conditional VAR on drawn shapes: three quarters of an hour on one core; not shipped
	$(BIN)/python -m demo.training.var

var-tradeoff: train-var ## score pruning policies on that model; JSON to benchmarks/results
	$(BIN)/python -m demo.measuring.var_tradeoff

inpaint-var: train-var ## redraw a shape as another class with that model; draws docs/inpaint_var.png
	$(BIN)/python -m demo.measuring.inpaint_var

bench-upscale: $(STAMP) ## enlarge 50 held-out scenes: PSNR of ours and of bicubic; draws docs/upscale.png, docs/inpaint.png
	$(BIN)/python -m demo.measuring.upscale
	$(BIN)/python -m demo.measuring.inpaint

bench-scaling: $(STAMP) ## time a 125 M model from 256x256 to 1024x1024, dense and pruned; writes docs/scaling.svg and JSON
	$(BIN)/python -m benchmarks.scaling

tune-demo: $(STAMP) ## search pruning policies for the demo, half an hour; writes docs/tune.svg and JSON to benchmarks/results
	$(BIN)/python -m demo.measuring.tune

precisions: $(STAMP) ## score the demo in fp32, fp16, bf16 and with 8-bit weights; writes JSON to benchmarks/results
	$(BIN)/python -m demo.measuring.precisions

# A Python that has torch for CUDA is used as it is; the package is used where it lies: nothing has to be built without
# a network. GPU_RUN is a program that runs what was prepared.
GPU_RUN := build/gpu/python
define GPU_INSTALL
	$(PYTHON) -m benchmarks.gpu.install --prepare build/gpu --venv $(GPU_VENV) $(if $(WHEELS),--wheels "$(WHEELS)")
endef

gpu: ## on a machine with an NVIDIA GPU: truth, timings, gpu tests, one JSON, and on again after a stop; CACHE, WHEELS, GPU=OPTIONS
	$(GPU_INSTALL)
	$(if $(CACHE),FASTVAR_CACHE="$(abspath $(CACHE))") $(GPU_RUN) -m benchmarks.gpu $(GPU)

gpu-bench: ## there too: engines against eager torch, infinity_2b to 2048x2048; as bench and gpu, with BENCH, CACHE and WHEELS
	$(GPU_INSTALL)
	$(if $(CACHE),FASTVAR_CACHE="$(abspath $(CACHE))") $(GPU_RUN) -m benchmarks --device cuda --keep-going $(BENCH)

# PYTHON has a CUDA build of the torch that the GPU's machine has.
gpu-pack: $(if $(PACK_RTX),$(STAMP)) ## engines of make gpu for CAPABILITY=sm90, made without a GPU; PACK_RTX=whole or halves packs that library
	$(GPU_INSTALL)
	$(GPU_RUN) -m benchmarks.gpu pack --out dist/gpu/cache --capability $(CAPABILITY) $(GPU)
	$(if $(PACK_RTX),$(BIN)/python -m benchmarks.gpu.install --pack dist/gpu/wheels $(if $(filter halves,$(PACK_RTX)),--halves))

docs: $(STAMP) ## build the documentation site into build/site; warnings are errors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	mkdir -p build/source && ln -sfn ../.. build/source/fastvar
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

torture: $(STAMP) ## campaigns that kill, fill disks, damage files and drop streams; JSON to benchmarks/results; TORTURE=OPTIONS
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[torture]"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(TORTURE)

clean: ## remove .venv, caches and everything made by the demo
	rm -rf $(VENV) $(GPU_VENV) $(CUDA_VENV) $(RAY_VENV) $(LOWEST_VENV) demo/out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
