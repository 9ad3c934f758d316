# Type `make` for the list of commands. Each sets up .venv by itself when it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
EXTRAS := lm,worldmodel,coinrun,dev
# The stamp carries the hash of the pins (pyproject.toml above its first [tool.*] table), the extras and this recipe: other
# edits, a new checkout or a touched file install nothing.
PINS := $(shell { sed '/^\[tool\./,$$d' pyproject.toml; cat containers/coinrun.no-deps.txt; echo '$(EXTRAS)'; } | sha256sum | cut -c1-16)
STAMP := $(VENV)/.pins-$(PINS)
# Two processes of one thread each: the tests are small, and more threads only fight for the cores. Each takes half of the
# files, so that what the tests of one share (runs, compiled functions) is mostly made once, and helps the other at the end.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

# Locks, bills of materials and launch files are checked by tools whose own pins do not fit beside ours.
RELEASE := .venv-release
RELEASE_PY := $(RELEASE)/bin/python
RELEASE_STAMP := $(RELEASE)/.pins-$(PINS)

export PYTHON PIP_FLAGS GPU

.PHONY: help
help:  ## this list
	@awk 'BEGIN {FS = ":[^#]*## "} /^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP):
	@scripts/setup.sh $(VENV) $(EXTRAS)
	@rm -f $(VENV)/.pins-* && touch $@

$(RELEASE_STAMP):
	@GPU=0 scripts/setup.sh $(RELEASE) release
	@rm -f $(RELEASE)/.pins-* && touch $@

.PHONY: setup
setup: $(STAMP)  ## make .venv, once and again only when the pins change (PYTHON=, PIP_FLAGS=, GPU=0|1)

.PHONY: demo
demo: $(STAMP)  ## train a small model on the standard library's text, export it, score the artifact, plot (CPU, minutes)
	$(PY) scripts/demo.py $(ARGS)

.PHONY: golf-mini golf-h200
golf-mini: $(STAMP)  ## a track: two cores, 600 s, 500,000 bytes; prints its place (CORPUS=text, ARGS='--seed 1'); twice: the same bits
	PYTHONPATH=. $(PY) scripts/golf.py mini $(if $(CORPUS),--corpus $(CORPUS)) $(ARGS)
golf-h200: $(STAMP)  ## a track: one H200, 600 s, 16,000,000 bytes (CORPUS=text)
	PYTHONPATH=. $(PY) scripts/golf.py h200 $(if $(CORPUS),--corpus $(CORPUS)) $(ARGS)

.PHONY: leaderboard
leaderboard: $(STAMP)  ## write submissions/leaderboards (TRACK=mini, RUNS='runs/a runs/b', DATA=folder)
	PYTHONPATH=. $(PY) scripts/leaderboard.py $(or $(TRACK),mini) $(if $(RUNS),--runs $(RUNS)) $(if $(DATA),--data $(DATA)) $(ARGS)

.PHONY: ablate
ablate: $(STAMP)  ## a paired ablation, run or resumed, and its report (SPEC=scripts/ablations/NAME.toml, DATA=folder, ARGS=--report)
	PYTHONPATH=. $(PY) scripts/ablate.py $(SPEC) --data $(DATA) $(ARGS)

.PHONY: recipe-search
recipe-search: $(STAMP)  ## write submissions/jepa_mamba/RECIPE.md from benchmarks/ablations
	PYTHONPATH=. $(PY) scripts/recipe_search.py $(ARGS)

.PHONY: jepa-answer
jepa-answer: $(STAMP)  ## write submissions/jepa_mamba/TO_JEPA_OR_NOT.md from benchmarks/ablations
	PYTHONPATH=. $(PY) scripts/jepa_answer.py $(ARGS)

.PHONY: coinrun
coinrun: $(STAMP)  ## record CoinRun, train a world model, roll it out, score it, write the page (PROFILE=cpu|gpu|paper)
	$(PY) -m worldmodel coinrun --profile $(or $(PROFILE),cpu) $(ARGS)

.PHONY: worldmodel-baselines
worldmodel-baselines: $(STAMP)  ## train and score every kind of world model on CoinRun, write its leaderboard (PROFILE=, ARGS=)
	$(PY) -m worldmodel baselines --profile $(or $(PROFILE),cpu) --leaderboard worldmodel/LEADERBOARD.md $(ARGS)

.PHONY: play
play: $(STAMP)  ## steer the packaged CoinRun world in the browser (RUN=runs/coinrun-cpu, ARTIFACT=file, PORT=8377)
	$(PY) -m worldmodel play $(if $(RUN),--run $(RUN)) $(if $(ARTIFACT),--artifact $(ARTIFACT)) $(if $(PORT),--port $(PORT)) $(ARGS)

.PHONY: report
report: $(STAMP)  ## one HTML page for a run folder of either learner, or for several (RUN='runs/a runs/b', OUT=page.html)
	$(PY) scripts/report.py $(or $(RUN),runs/demo) $(if $(OUT),--out $(OUT)) $(ARGS)

.PHONY: test
test: $(STAMP)  ## all tests but the slow ones and those that need a GPU (ARGS='-k name')
	$(PYTEST) -m "not slow and not gpu and not container" $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP)  ## the slow tests
	$(PYTEST) -m "slow and not gpu" $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

.PHONY: bundle
bundle: $(STAMP)  ## dist/jepa_mamba/: one train_gpt.py and its papers (PRESET=seed_bpe, RUNS='runs/a runs/b')
	$(PY) scripts/bundle.py $(if $(PRESET),--preset $(PRESET)) $(if $(RUNS),--runs $(RUNS)) $(ARGS)

.PHONY: verify-artifact-size
verify-artifact-size: $(STAMP)  ## code + weights against 16,000,000 bytes, by tensor group (ARTIFACT=file, PRESET=seed_bpe)
	$(PY) scripts/verify_artifact_size.py $(if $(PRESET),--preset $(PRESET)) $(if $(ARTIFACT),--artifact $(ARTIFACT)) $(ARGS)

.PHONY: containers
containers: $(STAMP)  ## build images with docker or buildah (IMAGES='cpu lm worldmodel', BUILD_FLAGS=, SOURCE_DATE_EPOCH=)
	$(PY) scripts/containers.py build $(or $(IMAGES),cpu) $(BUILD_FLAGS)

.PHONY: container-test
container-test: containers  ## build images and run them closed: size, scores, training, pins (CONTAINER_REBUILD=1: twice)
	$(PY) -m pytest -m container tests/containers -rs $(ARGS)

.PHONY: lock
lock: $(RELEASE_STAMP)  ## write containers/locks anew from pyproject.toml (UV_INDEX=, UV_FIND_LINKS=: torch's CPU build)
	$(RELEASE_PY) scripts/containers.py lock $(ARGS)

.PHONY: sbom
sbom: $(RELEASE_STAMP)  ## dist/sbom/: CycloneDX bills of materials of the locks (ARGS=--audit: known vulnerabilities)
	$(RELEASE_PY) scripts/containers.py sbom $(ARGS)

.PHONY: launch-check
launch-check: $(RELEASE_STAMP)  ## scripts/launch against SkyPilot's, Kubernetes' and Slurm's own checks (JOBSET_CRD=file)
	$(RELEASE_PY) -m pytest tests/scripts/test_launch.py -rs -m "not slow" $(ARGS)

.PHONY: verify-submission
verify-submission: $(STAMP)  ## is a submission folder what it claims? (DIR=dist/jepa_mamba, RUNS='runs/a runs/b', DATA=folder, AGAINST=record)
	PYTHONPATH=. $(PY) scripts/verify_submission.py $(or $(DIR),dist/jepa_mamba) $(if $(DATA),--data $(DATA)) $(if $(RUNS),--runs $(RUNS)) \
		$(if $(AGAINST),--against $(AGAINST)) $(ARGS)

.PHONY: readme
readme: $(STAMP)  ## write the generated tables of README.md anew (RUNS=runs/demo adds a run)
	$(PY) scripts/readme_tables.py $(if $(RUNS),--runs $(RUNS)) $(ARGS)

.PHONY: clean
clean:  ## remove .venv, dist and caches (runs/ and data/ stay)
	rm -rf $(VENV) $(RELEASE) dist build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
