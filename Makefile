# Two commands, neither of which needs the other first:
#   make figures    set up, then run every experiment: figures in out/<experiment>/laptop/results.png; FLAGS go to each
#   make test       set up, then run the tests
PYTHON ?= python3
# Threads that wait for each other soon give their core away, instead of turning in circles: else a second program on the
# same cores makes each of these ten times slower, not twice.
export GOMP_SPINCOUNT ?= 10000
BIN := .venv/bin
# a quick one first, the long ones last
EXPERIMENTS := $(wildcard exp_toy2d.py exp_cfg_paradox.py exp_shells.py exp_gaussian.py exp_freedom.py exp_scaling.py)

.PHONY: figures test lint notebooks assets rerun readme bench clean

figures: .venv/ready
	@for script in $(EXPERIMENTS); do echo "== $$script"; $(BIN)/python $$script $(FLAGS) || exit 1; done

# A process a core, each of one thread; all of a file goes to one of them, for what its tests share. In alphabetical
# order, since the files with the most tests, which xdist would take first, are not those that last.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

# out/notebooks/*.ipynb, made from the scripts; needs jupytext, and says so
notebooks: .venv/ready
	$(BIN)/python tests/notebooks.py

# For maintainers: what the README shows, from the last `make bench`.
assets:
	@for script in $(EXPERIMENTS:.py=); do for kind in json png; do \
	  cp out/$$script/laptop/results.$$kind assets/$$script.$$kind || exit 1; done; done
	cp out/exp_scaling/laptop/results_when.png assets/exp_scaling_when.png
	for script in exp_shells exp_toy2d; do $(BIN)/python $$script.py --redraw --animate > /dev/null && \
	  cp out/$$script/laptop/results.gif assets/$$script.gif || exit 1; done
	cp out/bench.json out/bench_score.json out/bench_score.png assets/
	if [ -f out/bench_score_gpu.json ]; then cp out/bench_score_gpu.json assets/; fi
	$(MAKE) readme

# The same on a second machine, after `make bench` there: its verdicts beside those of the first.
rerun:
	cp out/rerun.json assets/
	$(MAKE) readme

readme: .venv/ready
	$(BIN)/python tests/readme.py

bench: .venv/ready
	$(BIN)/python tests/bench.py figures tests score growth ranks memory

clean:
	rm -rf .venv out
