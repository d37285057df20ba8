"""The README: its numbers are those of assets/*.json, its commands exist, its files are there."""
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import readme
import tyro

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = sorted({line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
                   for line in block.replace("\\\n", "").splitlines() if line.split("#")[0].strip()})


def test_numbers_are_those_of_the_assets():
    assert readme.render(TEXT) == TEXT, "README.md is stale: run make readme"


def test_prose_says_what_the_verdicts_say():
    """The sections written by hand, on the controls and on Figure 3: to be rewritten when one of these changes."""
    for script, start, verdict in (
            ("exp_shells", "C1 a restricted", "holds"), ("exp_shells", "C2 sampling", "holds"),
            ("exp_shells", "C2 mostly", "contradicted"),
            ("exp_shells", "control: trajectories leave where", "holds"),
            ("exp_shells", "control: trajectories leave before new", "holds"),
            ("exp_cfg_paradox", "Fig 2 learned", "contradicted"),
            ("exp_cfg_paradox", "control: learned gap, training", "contradicted"),
            ("exp_shells", "Fig 4 memorization ratio at t = 0.5", "holds"),
            ("exp_shells", "Fig 4 memorization ratio at t = 0.75", "contradicted"),
            ("exp_scaling", "Fig 3 supervision error per decade", "holds"),
            ("exp_scaling", "Fig 3 extrapolation error per decade", "contradicted"),
            ("exp_scaling", "Fig 7c FD at equal L, U-Net, attention", "holds"),
            ("exp_scaling", "Fig 3 plateau, half the contrast: extrapolation", "contradicted"),
            ("exp_scaling", "Fig 7c L at equal compute, middle, U-Net, attention", "holds"),
            ("exp_scaling", "Fig 7c L at equal compute, most, U-Net, attention", "not resolved"),
            ("exp_scaling", "Fig 6 the same ratio, ", "contradicted"), ("exp_scaling", "Fig 6 control", "holds")):
        assert readme.one(script, start)["verdict"] == verdict, start
    assert {c["verdict"] for c in readme.claims("exp_scaling", "Fig 3 plateau after")} == {"not resolved"}
    for start in ("dial", "onset, textures: extrapolation"):
        assert {c["verdict"] for c in readme.claims("exp_scaling", start)} == {"contradicted"}
    assert "holds" not in {c["verdict"] for c in readme.claims("exp_scaling", "Fig 7b FD")}         # REPA


def test_a_second_machine_that_disagrees_is_shown(monkeypatch):
    load, again = readme.load, readme.load("rerun")
    there = {c["claim"] for c in readme.claims("exp_shells")}
    row = next(c for c in again["claims"]["exp_shells"] if c["claim"] in there)
    row["verdict"] = {"holds": "contradicted"}.get(row["verdict"], "holds")
    del again["claims"]["exp_toy2d"]
    monkeypatch.setattr(readme, "load", lambda name: again if name == "rerun" else load(name))
    text = readme.rerun()
    assert row["claim"][:12] in text.split("The others:")[1]
    known = [readme.beside(script, found) for script, found in again["claims"].items()]
    newer = sum(len(readme.claims(script)) for script in readme.FIGURES) - sum(map(len, known))
    assert newer >= len(readme.claims("exp_toy2d")) and f"{newer} claims are newer" in text
    again["machine"] = load("bench")["machine"]
    with pytest.raises(AssertionError):
        readme.rerun()


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def load(script, monkeypatch):
    """Import a script by its path from the root: train.py, data/prepare.py."""
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)
    return importlib.import_module(Path(script).stem)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_real(line, monkeypatch):
    """Make targets exist; every flag of every script is one of its Config, with a value of the right type."""
    argv = shlex.split(line)
    if argv[0] == "torchrun":
        argv = ["python"] + [a for a in argv[1:] if not a.startswith("--nproc") and a != "--"]
    if argv[0] == "make":
        for target in argv[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    elif argv[0] == "python" and argv[1] != "tests/bench.py":
        module = load(argv[1], monkeypatch)
        presets = getattr(module, "PRESETS", {})
        name = argv[argv.index("--preset") + 1] if "--preset" in argv else None
        assert name is None or name in presets
        tyro.cli(module.Config, args=argv[2:], **({"default": presets[name or "laptop"]} if presets else {}))
    else:
        assert argv[0] in ("git", "cd") or (ROOT / argv[1]).exists(), line


def test_there_are_commands_to_check():
    assert {"make figures", "make test", "torchrun --nproc_per_node=4 train.py"} <= set(COMMANDS)


def test_assets_are_small_and_budgets_are_kept():
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size <= 300_000, path
    budgets = {"model.py": 400, "empirical_score.py": 350, "sample.py": 200, "train.py": 350, "exp_scaling.py": 450}
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 120, path.name
        # a file that needs more lines says why at its top; its metadata block, the same in all, is not for reading
        text = re.sub(r"^# /// script\n(#.*\n)+?# ///\n", "", text, count=1, flags=re.M)
        if len(text.splitlines()) > budgets.get(path.name, 300):
            assert "longer than" in text[:text.index('"""', 3)], (path.name, len(text.splitlines()))


def test_imports_point_up_the_list():
    order = ["model", "empirical_score", "sample", "train"]
    for path in ROOT.glob("*.py"):
        allowed = {"model": [], "empirical_score": [], "sample": ["model"], "train": order[:3]}.get(path.stem, order)
        local = {p.stem for p in ROOT.glob("*.py")}
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)) & local
        assert imported <= set(allowed), (path.name, imported)


def test_nothing_written_at_run_time_is_in_git():
    listed = subprocess.run(["git", "ls-files", "out", "data"], cwd=ROOT, capture_output=True, text=True)
    assert set(listed.stdout.split()) <= {"data/prepare.py", "data/imagenet.py"}
