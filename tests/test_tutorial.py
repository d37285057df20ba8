"""What makes the project easy to take away: pins, script metadata, copies of one experiment, notebooks, animations."""
import ast
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import notebooks
import numpy as np
import pytest
import test_experiments
import test_freedom
import test_scaling
import test_toy2d
import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(p.name for p in ROOT.glob("exp_*.py")), "train.py", "sample.py", "data/prepare.py"]
MODEL = ["--train.data=digits", "--train.model=SiT-nano/4", "--train.steps=30", "--train.batch=16", "--device=cpu"]
TINY = {
    "exp_toy2d": test_toy2d.TINY + ["--animate"],
    "exp_gaussian": ["--points", "20", "40", "--seeds=2", "--iterations=200", "--n-eval=20", "--lr=1e-2",
                     "--device=cpu"],
    "exp_cfg_paradox": test_experiments.TINY["exp_cfg_paradox"] + MODEL,
    "exp_shells": test_experiments.TINY["exp_shells"] + MODEL + ["--animate"],
    "exp_freedom": test_freedom.TINY + ["--workers=1"],
    "exp_scaling": test_scaling.TINY + ["--only=fig3"],
}
ALONE = ("exp_toy2d", "exp_gaussian")                        # these need empirical_score.py and nothing else
BLOCK = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///\n", re.M)


def pins(name):
    """requirements.txt or constraints.txt -> {package: version}; every line must be a pin."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    rows = [Requirement(line) for line in lines if line]
    for row in rows:
        assert re.fullmatch(r"==[\w.]+", str(row.specifier)) and not row.marker, f"{name}: {row} is no plain pin"
    return {canonicalize_name(row.name): str(row.specifier) for row in rows}


# ---- house-keeping ---------------------------------------------------------------------------------------------------

def test_all_that_is_installed_is_pinned_once():
    """From each requirement down through what its packages ask for, on Linux, Windows and macOS: in one file alone."""
    direct, pulled = pins("requirements.txt"), pins("constraints.txt")
    assert not direct.keys() & pulled.keys()
    systems = [dict(sys_platform=s, platform_system=p, extra="") for s, p in
               (("linux", "Linux"), ("win32", "Windows"), ("darwin", "Darwin"))]
    todo, seen = [*direct], set()
    while todo:
        if (name := canonicalize_name(todo.pop())) in seen:
            continue
        seen.add(name)
        if name.startswith(("nvidia-", "cuda-", "triton", "setuptools")):        # torch's own pins, on CUDA machines
            continue
        assert name in direct or name in pulled, f"{name} is not pinned: add it to constraints.txt"
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:                          # of another system
            continue
        todo += [q.name for q in map(Requirement, requires)
                 if not q.marker or any(q.marker.evaluate(system) for system in systems)]
    assert len(seen) > len(direct) + 10 and pulled.keys() <= seen, pulled.keys() - seen
    assert "-c constraints.txt" in (ROOT / "Makefile").read_text()


def test_the_citation_is_the_readmes():
    readme, cff = (ROOT / "README.md").read_text(), (ROOT / "CITATION.cff").read_text()
    field = lambda name: re.search(rf"^ +{name} += \{{(.*)\}}", readme, re.M)[1]
    paper = cff[cff.index("preferred-citation:"):]
    for value in (field("title"), field("journal"), field("year")):
        assert value in paper, value
    for family, given in (author.split(", ") for author in field("author").split(" and ")):
        assert f"    - family-names: {family}\n      given-names: {given}\n" in paper


# ---- script metadata (PEP 723) ---------------------------------------------------------------------------------------

def imports(path, seen=None):
    """{package: whether its absence is caught} of a script and the project's files that it imports, lazy ones too."""
    seen = set() if seen is None else seen
    if path in seen:
        return {}
    seen.add(path)
    tree, found = ast.parse(path.read_text()), {}
    caught = {node for block in ast.walk(tree) if isinstance(block, ast.Try)
              if any("ImportError" in ast.unparse(h.type) for h in block.handlers if h.type)
              for statement in block.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) else [])
        for name in (n.split(".")[0] for n in names):
            if (local := ROOT / f"{name}.py").exists() or (local := ROOT / "data" / f"{name}.py").exists():
                for k, optional in imports(local, seen).items():
                    found[k] = found.get(k, True) and optional
            elif name not in sys.stdlib_module_names:
                found[name] = found.get(name, True) and node in caught
    return found


def needed(path):
    """The pins of requirements.txt that a script needs, in the order of that file."""
    package = {"sklearn": "scikit-learn", "skimage": "scikit-image", "faiss": "faiss-cpu", "PIL": "pillow"}
    direct, found = pins("requirements.txt"), {package.get(k, k): v for k, v in imports(path).items()}
    for name, optional in found.items():                     # of the packages pulled in, only matplotlib's pillow
        assert name in direct or name == "pillow" or optional, f"{path.name} imports {name}: pin it, or catch its lack"
    return [name + version for name, version in direct.items() if name in found]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_metadata(script):
    """What `uv run` installs is what the script and its files import, at the pins of requirements.txt."""
    text = (ROOT / script).read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == 1, f"{script} has {len(blocks)} blocks # /// script"
    metadata = tomllib.loads("".join(line[2:] for line in blocks[0].splitlines(keepends=True)))
    assert metadata == {"requires-python": ">=3.11", "dependencies": needed(ROOT / script)}
    end = ast.parse(text).body[0].end_lineno                 # right after the docstring, in all scripts
    assert text.splitlines()[end] == "# /// script"


# ---- one experiment to take away -------------------------------------------------------------------------------------

def copy(script, folder):
    """A script, and the files that it may need, into an empty folder."""
    names = ["empirical_score"] if script in ALONE else ["model", "empirical_score", "sample", "train"]
    for name in (script, *names):
        shutil.copy(ROOT / f"{name}.py", folder)


def start(folder, script, *argv):
    """python script.py in `folder`, with nothing of this checkout on its path, started."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, f"{script}.py", *argv], cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def untimed(results):
    """What is in results.json, without the times that were taken and the commit."""
    if isinstance(results, dict):
        return {k: untimed(v) for k, v in results.items() if k not in ("seconds", "ms", "commit")}
    return [untimed(v) for v in results] if isinstance(results, list) else results


@pytest.mark.parametrize("script", TINY)
def test_a_copied_experiment_runs_and_runs_the_same_again(script, tmp_path_factory):
    """In two folders, from nothing: the same numbers, and the same picture, bit for bit."""
    tmp_path, again = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    children = []
    for folder in (tmp_path, again):
        copy(script, folder)
        children.append(start(folder, script, *TINY[script]))
    (printed, err), (_, err2) = (child.communicate(timeout=200) for child in children)
    assert [child.returncode for child in children] == [0, 0], (err + err2)[-2000:]
    assert not any(sign in text for sign in ("\r", "it/s", "%|") for text in (printed, err)), err    # no bars in a file
    out = tmp_path / "out" / script / "laptop"
    one, two = (json.loads((f / "out" / script / "laptop" / "results.json").read_text()) for f in (tmp_path, again))
    assert untimed(one) == untimed(two) and "arrays" in one
    if "ms" in one["arrays"]:                                # this picture tells times: here those of the first run
        two["arrays"]["ms"] = one["arrays"]["ms"]
        (again / "out" / script / "laptop" / "results.json").write_text(json.dumps(two))
        assert start(again, script, "--redraw").wait(timeout=200) == 0
    for kind in ("png", "gif"):
        pictures = [list((f / "out" / script / "laptop").glob(f"*.{kind}")) for f in (tmp_path, again)]
        assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]], kind
    if script in ALONE:                                      # what it does, and for how long, before all else
        docstring = (ROOT / f"{script}.py").read_text().splitlines()
        assert printed.startswith(docstring[1] + "\nlaptop preset: ")
        assert printed.splitlines()[1].removeprefix("laptop preset: ") in "".join(docstring[:20])
    assert str(out / "results.png") in printed and (out / "results.png").stat().st_size > 20_000
    figures, table = printed.split(f"\n{'claim':74s}")       # the table is last
    assert all(str(p) in figures and str(p) not in table for p in out.glob("results.*"))
    assert len(table.splitlines()) == 1 + len(one["claims"])
    assert json.loads((out / "results.json").read_text())["script"] == script
    if "--animate" in TINY[script]:
        with Image.open(out / "results.gif") as gif:
            pictures = [np.asarray(frame.convert("L"), dtype=int) for frame in ImageSequence.Iterator(gif)]
        assert len(pictures) >= 5 and str(out / "results.gif") in printed
        assert all(np.abs(a - b).max() > 50 for a, b in pairwise(pictures))      # something moves in every frame
    assert {p.name for p in tmp_path.iterdir()} <= {f"{script}.py", "empirical_score.py", "model.py", "sample.py",
                                                    "train.py", "out", "data", "__pycache__"}


def test_every_experiment_is_copied():
    assert {p.stem for p in ROOT.glob("exp_*.py")} == TINY.keys()


# ---- notebooks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", TINY)
def test_a_notebook_holds_the_whole_script(script):
    """Every statement of the script but the last, in order, and every line of its docstring and its section rules."""
    source = (ROOT / f"{script}.py").read_text()
    cells = re.split(r"^# %%", notebooks.percent(ROOT / f"{script}.py"), flags=re.M)[1:]
    text, code = ("".join(c for c in cells if c.startswith(" [markdown]") == kind) for kind in (True, False))
    dump = lambda tree: [ast.dump(node) for node in tree.body]
    want, got = dump(ast.parse(source))[1:-1], dump(ast.parse(code))         # without the docstring and `if __name__`
    start = got.index(want[0], 4)                            # after the set-up cell
    assert got[start:start + len(want)] == want
    assert len(cells) >= 9 and text.count("\n# ## ") >= 4
    for line in ast.get_docstring(ast.parse(source)).splitlines():
        assert line.strip().replace("_*", "") in text.replace("\\_\\*", "").replace("_*", ""), line


def test_without_jupytext_the_message_names_it(tmp_path):
    (tmp_path / "jupytext.py").write_text("raise ImportError('not here')")               # as if it were not installed
    done = subprocess.run([sys.executable, ROOT / "tests" / "notebooks.py", tmp_path / "out"], capture_output=True,
                          text=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr == "error: notebooks need the package jupytext: .venv/bin/python -m pip install jupytext\n"


@pytest.mark.parametrize("script", TINY)
def test_a_notebook_runs(script, tmp_path):
    """At a tiny size, beside the files that the experiment may need."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("jupytext"), pytest.importorskip("ipykernel")
    copy(script, tmp_path)
    argv = [a for a in TINY[script] if not a.startswith("--workers")]
    argv += ["--workers=1"] if script in ("exp_freedom", "exp_scaling") else []
    path = notebooks.write(ROOT / f"{script}.py", tmp_path / "out" / "notebooks",
                           f'__import__("tyro").cli(Config, args={argv}, default=PRESETS["laptop"])')
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources=dict(metadata=dict(path=path.parent))).execute()
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].outputs)
    assert (tmp_path / "out" / script / "laptop" / "results.png").exists()


# ---- exercises -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", sorted(TINY))
def test_exercises_can_be_done(script):
    """Three at the end of the docstring; their flags exist, and so does what they change in measure."""
    text = (ROOT / f"{script}.py").read_text()
    exercises = re.split(r"^\d\. ", ast.get_docstring(ast.parse(text)).partition("\nTry this")[2], flags=re.M)[1:]
    assert len(exercises) == 3
    module = importlib.import_module(script)
    for exercise in exercises:
        if command := re.match(rf"python {script}.py((?: --?\S+(?: [\w./]+(?= ))*)+)", exercise):
            tyro.cli(module.Config, args=shlex.split(command[1]), default=module.PRESETS["laptop"])
        else:
            assert exercise.startswith("In measure, ") and 'data["x' in text[text.index("\ndef measure"):]
