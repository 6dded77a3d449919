# Everything here is made from this file: `make help` lists the targets.
#
# Without PYTHON, a virtual environment .venv is made from requirements.lock, by the first Python of BASE_PYTHON that
# will do. With it, say `make PYTHON=python test` inside an active conda environment, that interpreter is used as it is.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.NOTPARALLEL: # one notebook after the other, whatever -j says: each has all cores, and kernels that start together race for ports

# A variable that merely lies in the environment is not meant for us; on make's command line it is.
$(foreach name,PYTHON PRESET DATA MODELS BACKBONE RECORDS MINUTES,$(if $(filter environment,$(origin $(name))),\
  $(warning $(name) of the environment is not taken; say make $(name)=… if it is meant)$(eval $(name) :=)$(eval unexport $(name))))
BASE_PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
LOCK := requirements.lock
BUILT := torch torchvision numpy scipy pandas pyarrow pillow matplotlib# of the lock: each has a wheel for some Pythons only
ifneq ($(PYTHON),)
ENV := active-env
else
PYTHON := .venv/bin/python
ENV := .venv/.stamp
endif
RUN := "$(PYTHON)"
# A path of the user's as one that holds in any folder; make's own functions would cut it at its spaces.
whole = $(shell path='$(1)'; first="$${path:0:1}"; if [ "$$first" = "~" ]; then path="$$HOME$${path:1}"; elif [ -n "$$path" ] && [ "$$first" != / ]; then path="$$PWD/$$path"; fi; printf %s "$$path")

# What each notebook is, and the modules it uses: a change to a figure does not retrain a model.
NOTEBOOKS := 01_data 02_training 03_main_results 04_ablation 05_transfer 06_cost 07_grounded 08_guarantee 09_memory
TRAINS    := 01_data 02_training
ABOUT.01_data         := builds FGVEdit-Scenes and looks at it
ABOUT.02_training     := trains the scope classifier and the editors that learn
ABOUT.03_main_results := runs every editor on the test records and makes the paper's main tables
ABOUT.04_ablation     := takes the scope classifier apart: fusion, CLIP, supervision, vision, threshold
ABOUT.05_transfer     := moves the classifier to another backbone, to other data, and to many edits at once
ABOUT.06_cost         := counts parameters and FLOPs, times every part, and grows the memory
ABOUT.07_grounded     := grounds the scope classifier in the words of a question
ABOUT.08_guarantee    := chooses thresholds that bound how often an edit leaks
ABOUT.09_memory       := writes, revises, kills and grows the memory

REPORT   := $(wildcard mscke/report/figures.py mscke/report/pictures.py mscke/report/tables.py)
BENCHMARK := $(wildcard mscke/config.py mscke/benchmark/*.py mscke/fetching/*.py mscke/system/*.py)
TRAINING := $(BENCHMARK) $(wildcard mscke/classifier.py mscke/memory.py mscke/router.py mscke/models/*.py mscke/storage/*.py) \
            $(wildcard mscke/training/*.py mscke/editors/*.py mscke/assets/*.safetensors mscke/assets/*/*.safetensors)
RESULTS  := $(TRAINING) $(wildcard mscke/evaluation/*.py mscke/cost/*.py mscke/report/*.py)

STAMPS    := outputs/mini/.stamps
# The paper track, or with PRESET=tiny the same on tiny models and data in the published formats.
PAPER     := paper$(PRESET:%=-%)
PAPER_STAMPS := outputs/$(PAPER)/.stamps
PAPERS    := $(filter-out 07_grounded 08_guarantee 09_memory,$(NOTEBOOKS)) # the paper's experiments
NOTE      := *Executed on the track `$(PAPER)`. What the text says of results was written about the track `mini`.*
PAPERMILL := $(RUN) -m papermill -k python3 --cwd notebooks --no-progress-bar --log-output --execution-timeout 3600
# On mini every output is compared but plots and timings (tagged nbval-ignore-output); on smoke, only those
# that cannot depend on size (tagged nbval-check-output). Figures go elsewhere: what is timed then is not alone.
NBVAL     := TQDM_DISABLE=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest --nbval-current-env --nbval-cell-timeout 3600 --nbval-kernel-startup-timeout 600 \
             --nbval-sanitize-with tests/nbval_sanitize.cfg
TWO       := -n 2 --dist loadfile # two files at a time: hence the policy, else one's idle threads keep the other's waiting

# The mini track downloads nothing. Progress goes to the terminal; clean.py keeps it out of the notebooks.
reproduce smoke paper: export TQDM_MININTERVAL := 10
test: export TQDM_DISABLE := 1
reproduce smoke test: export HF_HUB_OFFLINE := 1
reproduce smoke test: export HF_HUB_DISABLE_PROGRESS_BARS := 1
# Folders of the user's own that hold the paper's data and models; only read.
paper paper-data paper-check: export MSCKE_DATA := $(call whole,$(DATA))
paper paper-data paper-check: export MSCKE_MODELS := $(call whole,$(MODELS))
# The kernel "python3" is this environment's, even where the user has another of that name.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help env active-env reproduce test smoke $(NOTEBOOKS:%=smoke-%) bench pretrain paper paper-data paper-check paper-dry lab lock lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

env: $(ENV) ## make or refresh .venv from requirements.lock (with PYTHON=python: the active environment as it is)

# A Python will do if it runs, is new enough, can make an environment, and the lock has wheels for it: all of that is
# seen before anything is installed.
define FIND_PYTHON
rm -rf .venv; why=; for python in $(BASE_PYTHON); do
  if ! found=$$("$$python" -c "import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))" 2>/dev/null); then
    why+="  $$python: $${found:-not there}$${found:+ is older than 3.11}"$$'\n'; continue; fi
  if ! "$$python" -m venv .venv >/dev/null 2>&1; then
    why+="  $$python: $$found cannot make an environment (on Debian: apt install python3-venv)"$$'\n'; rm -rf .venv; continue; fi
  if said=$$(.venv/bin/python -m pip install -q --dry-run --no-deps --only-binary :all: \
      $$(grep -E "^($$(tr ' ' '|' <<<"$(BUILT)"))==" "$(LOCK)" | sed 's/ *;.*//') 2>&1); then
    echo "== .venv: by $$python ($$found)"; echo "$$found" > .venv/.python; exit 0; fi
  why+="  $$python: $$found, but $(LOCK) has no wheels for it here: $$(grep -m 1 ERROR <<<"$$said" || tail -n 1 <<<"$$said")"$$'\n'; rm -rf .venv
done
printf '%s\n' "No Python here will do:" "$${why%?}" "Install Python 3.11 (apt install python3.11 python3.11-venv, brew install python@3.11," \
  "conda create -n py311 python=3.11, or uv python install 3.11), or name one: make BASE_PYTHON=/path/to/python3.11 env" >&2
exit 1
endef
export FIND_PYTHON

.venv/.python: $(LOCK)
	@if .venv/bin/python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && .venv/bin/python -m pip --version >/dev/null 2>&1; \
	then touch $@; else if [ -e .venv ]; then echo "== .venv: its Python is gone or too old; it is made anew"; fi; bash -eu -o pipefail -c "$$FIND_PYTHON"; fi

.venv/.stamp: .venv/.python $(LOCK) pyproject.toml
	@echo "== .venv: installing $(LOCK)"
	.venv/bin/python -m pip install --only-binary :all: -r "$(LOCK)"
	.venv/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

active-env:
	@$(RUN) -P -c 'import importlib.util as u, sys; s = u.find_spec("mscke"); sys.exit(not s or not s.origin.startswith(sys.argv[1]))' "$(CURDIR)/" \
	  || $(RUN) -m pip install --no-deps -e .

reproduce: $(NOTEBOOKS:%=$(STAMPS)/%) ## run the notebooks on the mini track, keep their outputs, compare with the paper
	MSCKE_TRACK=mini $(RUN) -m mscke.report.registry
	@echo "== the paper's numbers, the committed and the regenerated ones"
	MSCKE_TRACK=mini $(RUN) -m mscke.report.verify
	@echo "== nbval: the notebooks' checked outputs, two notebooks at a time"
	MSCKE_TRACK=mini MSCKE_FIGURES="$(CURDIR)/outputs/mini/checked" $(NBVAL) --nbval $(TWO) notebooks

# One stamp a notebook: an interrupted `make reproduce` goes on where it was.
$(STAMPS)/01_data $(PAPER_STAMPS)/01_data: $(BENCHMARK) $(REPORT) mscke/editors/serac.py
$(STAMPS)/02_training $(PAPER_STAMPS)/02_training: $(TRAINING)
AFTER_TRAINING := $(filter-out $(TRAINS),$(NOTEBOOKS))
$(AFTER_TRAINING:%=$(STAMPS)/%) $(AFTER_TRAINING:%=$(PAPER_STAMPS)/%): $(RESULTS)
$(STAMPS)/02_training: $(STAMPS)/01_data
$(AFTER_TRAINING:%=$(STAMPS)/%): $(STAMPS)/02_training
$(PAPER_STAMPS)/02_training: $(PAPER_STAMPS)/01_data
$(AFTER_TRAINING:%=$(PAPER_STAMPS)/%): $(PAPER_STAMPS)/02_training

# The executed notebook, cleaned, replaces its source, which is then newer than the stamp was: hence the last line.
$(NOTEBOOKS:%=$(STAMPS)/%): $(STAMPS)/%: notebooks/%.ipynb | $(ENV)
	@echo "== $*: $(ABOUT.$*)"
	@mkdir -p $(@D) outputs/notebooks
	MSCKE_TRACK=mini $(PAPERMILL) $< outputs/notebooks/$*.ipynb
	$(RUN) -m mscke.report.notebook outputs/notebooks/$*.ipynb outputs/notebooks/$*.clean.ipynb
	mv outputs/notebooks/$*.clean.ipynb $<
	touch $@

test: $(ENV) ## run the tests, then the notebooks under nbval on a few dozen records
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(TWO) tests
	@echo "== nbval: $(NOTEBOOKS) on the smoke track"
	MSCKE_TRACK=smoke $(NBVAL) --nbval-lax $(TRAINS:%=notebooks/%.ipynb)
	MSCKE_TRACK=smoke $(NBVAL) --nbval-lax $(TWO) $(AFTER_TRAINING:%=notebooks/%.ipynb)
	@echo "== the paper track, from nothing, on tiny models and data"
	rm -rf outputs/paper-tiny
	$(MAKE) paper PRESET=tiny
	@echo "== its dry run, on tiny shapes"
	OMP_NUM_THREADS=1 $(MAKE) paper-dry PRESET=tiny RECORDS=4

smoke: $(NOTEBOOKS:%=smoke-%) ## run the notebooks on a few dozen records into outputs/smoke/notebooks

smoke-02_training: smoke-01_data
$(AFTER_TRAINING:%=smoke-%): smoke-02_training
$(NOTEBOOKS:%=smoke-%): smoke-%: notebooks/%.ipynb | $(ENV)
	@echo "== $* (smoke): $(ABOUT.$*)"
	@mkdir -p outputs/smoke/notebooks
	MSCKE_TRACK=smoke $(PAPERMILL) $< outputs/smoke/notebooks/$*.tmp.ipynb
	mv outputs/smoke/notebooks/$*.tmp.ipynb outputs/smoke/notebooks/$*.ipynb

bench: $(ENV) ## time ours against the released way again, and write figures/tables/bench.csv
	MSCKE_TRACK=mini $(RUN) -m mscke.cost.bench

pretrain: $(ENV) ## pretrain the mini models again and write their weights to mscke/assets
	$(RUN) -m mscke.pretraining

paper: $(PAPERS:%=$(PAPER_STAMPS)/%) ## run the notebooks on the paper's models and data, into outputs/ (DATA=, MODELS=, PRESET=tiny)
	MSCKE_TRACK=$(PAPER) $(RUN) -m mscke.report.registry
	@echo "== outputs/$(PAPER): notebooks in notebooks/, tables and figures in figures/"

# All that the track is made of; what it lacks, or what does not fit together, shows here and not after hours.
define BRING
$(if $(filter tiny,$(PRESET)),$(RUN) -m mscke.models.tiny $(PAPER))
$(RUN) -m mscke.fetching --track $(PAPER)
$(RUN) -m mscke.models.prepare --track $(PAPER)
endef

# Fetched and verified when the track is run first, and only where it can run; later what the notebooks open is verified again.
$(PAPER_STAMPS)/fetched: | $(ENV)
	@mkdir -p $(@D)
	$(RUN) -m mscke.models.prepare --track $(PAPER) --device
	$(BRING)
	touch $@

# Training may take a day: no cell has a time limit.
$(PAPERS:%=$(PAPER_STAMPS)/%): $(PAPER_STAMPS)/%: notebooks/%.ipynb | $(ENV) $(PAPER_STAMPS)/fetched
	@echo "== $* ($(PAPER)): $(ABOUT.$*)"
	@mkdir -p outputs/$(PAPER)/notebooks
	MSCKE_TRACK=$(PAPER) $(PAPERMILL:3600=-1) $< outputs/$(PAPER)/notebooks/$*.tmp.ipynb
	$(RUN) -m mscke.report.notebook outputs/$(PAPER)/notebooks/{$*.tmp,$*}.ipynb '$(NOTE)'
	rm outputs/$(PAPER)/notebooks/$*.tmp.ipynb
	touch $@

paper-data: $(ENV) ## fetch FGVEdit, the COCO images it names and the models; verify, lock and compose them (DATA=, MODELS=, PRESET=blip2)
	$(BRING)

# With a GPU both backbones, in less than ten minutes; without one BLIP-2 alone, on two records.
paper-dry: $(ENV) ## run the paper track's work at its real sizes on random weights: hours and memory (BACKBONE=, RECORDS=, MINUTES=, PRESET=tiny)
	$(RUN) -m mscke.report.dry_run --track paper-dry$(PRESET:%=-%) $(if $(BACKBONE),--backbone '$(BACKBONE)') \
	  $(if $(RECORDS),--records $(RECORDS)) $(if $(MINUTES),--minutes $(MINUTES))

paper-check: $(ENV) ## say what the paper track has and lacks here, and what to do about it; changes nothing (PRESET=blip2)
	$(RUN) -m mscke.report.paper_check --track $(PAPER)

lab: $(ENV) ## open the notebooks in JupyterLab
	$(RUN) -m jupyter lab notebooks

# Every release of the environment, as the ranges of pyproject.toml resolve in it. PyTorch's CUDA libraries
# are installed on Linux only.
lock: $(ENV) ## write requirements.lock from the environment, after installing what pyproject.toml asks for
	$(RUN) -m pip install --no-build-isolation -e '.[dev]'
	{ sed '/^[^#]/,$$d' requirements.lock; \
	  $(RUN) -m pip list --format=freeze --exclude-editable --exclude pip --exclude mscke \
	    | sed -E 's/^((nvidia|cuda|triton)[^ ]*)$$/\1 ; platform_system == "Linux"/'; \
	} > requirements.lock.new
	mv requirements.lock.new requirements.lock
	if [ -e .venv/.stamp ]; then touch .venv/.stamp; fi

lint: $(ENV) ## check style and formatting with ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean: ## remove outputs/ (the paper track's data, models and trainings too) and caches, never .venv or a committed file
	rm -rf outputs build mscke.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./.git -prune \
	  -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
