"""README, docs and notebooks: numbers come from the assets, links exist, commands are real, code runs."""
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
sys.path.insert(0, str(ROOT / "data"))
import notebooks  # noqa: E402
import readme  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", "".join(p.read_text() for p in PAGES), re.M | re.S)
COMMANDS = [line.partition(" #")[0].strip() for block in BLOCKS
            for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def test_pages_are_those_of_the_assets():
    for path, text in readme.pages().items():
        assert path.read_text() == text, f"{path.name} is stale: make readme"


def test_the_readme_can_be_finished():
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 2_400


def test_links_and_pictures_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_asset_is_small_and_shown():
    shown = "".join(p.read_text() for p in PAGES)
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size <= 300_000, path.name
        assert path.suffix == ".json" or path.name in shown or path.name == "social.png", f"{path.name} is not shown"


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.search(r"\b\w+\.py\b", c)])
def test_commands_are_real(line):
    """The script exists, and every flag is one of its config's."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[at]
    assert script.exists(), line
    flags = [word.partition("=")[0] for word in words[at + 1:] if word.startswith("--")]
    if not flags or script.parent.name in ("tests", "docs", "data"):
        return
    module = importlib.import_module(script.stem)
    names = set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    for name, value in vars(module.Config()).items() if hasattr(module, "Config") and script.stem != "sample" else ():
        names.add("--" + name.replace("_", "-"))
        names |= {f"--{name}.{inner}".replace("_", "-") for inner in getattr(value, "__dict__", {})}
    if script.stem == "sample":
        names |= {"--" + field.replace("_", "-") for field in module.Config.__dataclass_fields__}
    assert set(flags) <= names | {"--preset", "--help"} or script.parent.name == "data", line


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in {words[1] for words in map(str.split, COMMANDS) if words[0] == "make" and len(words) > 1}:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_thirty_lines_of_code_run(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    quick = code.replace("range(2000)", "range(20)")
    assert quick != code and len([line for line in code.splitlines() if line.strip()]) <= 34
    done = subprocess.run([sys.executable, "-c", quick], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(MPLBACKEND="Agg", OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "four_points.png").exists()


def test_one_list_of_packages():
    """What uv installs is what pip installs, less what is for tests."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    for tool in ("pytest", "pytest-xdist", "hypothesis", "ruff"):
        pinned.pop(tool)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dict(package.split("==") for package in project["dependencies"]) == pinned
    for script in ("exp_toy2d.py", "exp_gaussian.py"):
        block = re.search(r"# dependencies ?= ?\[(.*?)\]", (ROOT / script).read_text(), re.S)[1]
        needed = dict(package.split("==") for package in re.findall(r'"(.+?)"', block))
        assert needed.items() <= pinned.items()


@pytest.mark.parametrize("script", sorted(ROOT.glob("exp_*.py")), ids=lambda p: p.stem)
def test_a_notebook_holds_the_whole_script(script, tmp_path):
    found = json.loads(notebooks.write_notebook(script, tmp_path).read_text())
    code = "\n".join(cell["source"] for cell in found["cells"] if cell["cell_type"] == "code")
    tree = ast.parse(script.read_text())
    for node in tree.body[1:]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert f" {node.name}" in code
    text = "\n".join(cell["source"] for cell in found["cells"] if cell["cell_type"] == "markdown")
    text = " ".join(text.replace("\\", "").replace("`", "").split())
    for paragraph in ast.get_docstring(tree).split("\n\n"):
        assert " ".join(paragraph.replace("`", "").split()) in text
    assert sum(cell["cell_type"] == "code" for cell in found["cells"]) > 8


NETWORK = "network=NetworkConfig(data='digits', model='SiT-pico/4', steps=4, grid=False, out='net')"
SIT = "NetworkConfig(model='SiT-pico/4', steps=2, batch=8, keep=(1,))"
TINY = dict(
    exp_toy2d="nets=2, width=16, steps=20, short=10, lambdas=(0.0, 1.0)",
    exp_gaussian="points=(20, 30), seeds=2, width=16, iterations=40, n_eval=40",
    exp_cfg_paradox=f"n=12, n_times=4, seeds=1, {NETWORK}",
    exp_shells=f"n=12, n_times=6, seeds=1, other_sets=(), {NETWORK}",
    exp_freedom=f"sit={SIT}, unet={SIT}, per_class=5, ratios=(1, 2), n_samples=10",
    exp_scaling="only='fig3', n_images=60, n_points=20, n_times=3, models=('SiT-pico/4',), lengths=(2, 3), seeds=2, "
                "textures=(1.0,)")


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_notebook_runs(name, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    changes = f"out={str(tmp_path / 'out')!r}, device='cpu', {TINY[name]}"
    path = notebooks.write_notebook(ROOT / f"{name}.py", tmp_path, changes)
    book = nbformat.read(path, 4)
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    for package in ("plumbing", "model.py", "sample.py", "train.py", "empirical_score.py"):
        (tmp_path / package).symlink_to(ROOT / package)
    nbclient.NotebookClient(book, timeout=300, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert list((tmp_path / "out").glob("fig*.png"))
