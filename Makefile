# The two commands of the README are `make demo` and `make test`; both set up what they need first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# where the real data sets are that some tests and `make soak` use
DATA   ?= ../shared/data

# flags of `singularity build`, and what differs from the image that container.def makes by default, such as
# CONTAINER_ARGS="--build-arg BOOTSTRAP=debootstrap --build-arg TORCH=2.13.0"
IMAGE           ?= generative-image-to-text.sif
CONTAINER_FLAGS ?= --fakeroot
CONTAINER_ARGS  ?=

.PHONY: demo test check format clean soak bench container container-test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps clip-interrogator
	@touch $(READY)

# drawn scenes -> a trained captioner -> its captions and answers on scenes unlike those it saw
demo: $(READY)
	$(BIN)/python inference.py -p "{'type': 'make_shapes', 'out_dir': 'data/shapes'}"
	$(BIN)/python train.py --config checkpoints/shapes/config.yml
	$(BIN)/python inference.py -p "{'type': 'evaluate', 'model_path': 'checkpoints/shapes/model_best.pt', \
	  'data_dir': 'data/shapes', 'image_tsv': 'test.img.tsv', 'caption_tsv': 'test.caption.tsv', \
	  'question_tsv': 'test.question.tsv', 'out_dir': 'inference/shapes'}"
	@echo "look at inference/shapes/report.html and checkpoints/shapes/loss_curve.png"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/codespell

# hours: the recipes on real data, then every command on what they made; mutated commands, files and pictures;
# kills of the batch task, of a training, of a download; corrupted saves
soak: $(READY)
	$(BIN)/python train.py --config checkpoints/easy_vqa/config.yml --data_dir $(DATA)/easy_vqa
	$(BIN)/python train.py --config checkpoints/rsicd/config.yml --data_dir $(DATA)/rsicd
	$(BIN)/python -m pytest -m soak -s tests/test_end_to_end.py
	$(BIN)/python -m benchmarks.region_gates
	$(BIN)/python -m benchmarks.paragraph_gates
	$(BIN)/python -m benchmarks.prompt_gates
	$(BIN)/python -m benchmarks.neighbours
	GIT_MODEL_FUZZ=20000 GIT_MODEL_KILLS=100 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_tsv_task.py
	GIT_MODEL_KILLS=1000 $(BIN)/python -m pytest -s tests/test_lost_runs.py -k test_kills
	GIT_MODEL_KILLS=100 $(BIN)/python -m pytest tests/test_download.py -k killed
	GIT_MODEL_CORRUPTIONS=700 GIT_MODEL_IMAGES=50000 $(BIN)/python -m pytest tests/test_saves.py tests/test_images.py

# an image that needs nothing but singularity or apptainer; this machine's pip settings are lent to the build
container:
	.ci/container $(IMAGE) $(CONTAINER_FLAGS) $(CONTAINER_ARGS)

# the image without a registry and with the newest torch that constraints.txt knows, unless there is one; then everything in it
$(IMAGE):
	.ci/container $(IMAGE) $(CONTAINER_FLAGS) $(or $(CONTAINER_ARGS),--build-arg BOOTSTRAP=debootstrap \
	  --build-arg TORCH=$(patsubst torch==%,%,$(filter torch==%,$(file <constraints.txt))))

container-test: $(READY) $(IMAGE)
	GIT_MODEL_IMAGE=$(IMAGE) $(BIN)/python -m pytest -m container tests/test_container.py tests/test_container_slurm.py

# both sides of everything in one process tree: a table, benchmarks/results/benchmarks.json and .png; under 15 minutes
bench: $(READY)
	$(BIN)/python -m benchmarks --data $(DATA)

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) data/shapes inference/shapes
	find checkpoints -type f ! -name config.yml -delete
