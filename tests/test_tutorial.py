"""What makes the project easy to take away: pins, script metadata, copies of one experiment, notebooks, animations."""
import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


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
