# Two commands, neither of which needs the other first:
#   make figures    set up, train the default model, run every experiment: figures in out/<experiment>/laptop/
#   make test       set up, then run the tests
PYTHON ?= python3
# Threads that wait for each other soon give their core away, instead of turning in circles: else a second program on
# the same cores makes each of these ten times slower, not twice.
export GOMP_SPINCOUNT ?= 10000
BIN := .venv/bin
# a quick one first, the long ones last; each gets FLAGS, such as FLAGS="--preset gpu"
SCRIPTS := exp_toy2d exp_gaussian train exp_cfg_paradox exp_shells exp_freedom exp_scaling
EXPERIMENTS := $(filter exp_%, $(SCRIPTS))

.PHONY: figures test lint notebooks pictures assets readme bench clean

figures: .venv/ready
	@for script in $(SCRIPTS); do echo "== $$script.py"; $(BIN)/python $$script.py $(FLAGS) || exit 1; done

# A process a core, each of one thread; all of a file goes to one of them, for what its tests share.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

# out/notebooks/*.ipynb, made from the scripts
notebooks: .venv/ready
	$(BIN)/python docs/notebooks.py

# For maintainers: what the README shows, from the last `make bench`.
assets: .venv/ready
	$(BIN)/python docs/assets.py
	for file in bench.json bench_score.json bench_score.png bench_score_gpu.json; do \
	  if [ -f out/$$file ]; then cp out/$$file assets/; fi; done
	$(BIN)/python docs/scale.py
	$(MAKE) pictures readme

# the sketch, the GIF and the social picture, which belong to no experiment
pictures: .venv/ready
	$(BIN)/python docs/pictures.py

# README.md and docs/*.md, from docs/templates and assets/*.json
readme: .venv/ready
	$(BIN)/python docs/readme.py

bench: .venv/ready
	$(BIN)/python tests/bench.py figures tests score growth

clean:
	rm -rf .venv out
