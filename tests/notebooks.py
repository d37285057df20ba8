"""Turn the experiments into notebooks, so that there is no second copy to keep: python tests/notebooks.py [FOLDER]

The docstring becomes the text at the top, every section rule (# ---- and the comment below it) a heading and its text,
what lies between two rules one cell, and `if __name__ == "__main__"` a cell that runs a preset and shows the picture.
jupytext does the writing; the scripts know nothing of notebooks.
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULE = re.compile(r"^# -{20,}\n((?:#.*\n)*)", re.M)
# A notebook has no __file__, and lies beside the files that it imports or below them
SETUP = '''import sys
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "empirical_score.py").exists())
sys.path.insert(0, str(ROOT))
__file__ = str(ROOT / "{name}.py")
'''
RUN = '''cfg = {config}
{run}
from IPython.display import Image

Image(str((Path(cfg.out) if cfg.out else ROOT / "out" / "{name}" / cfg.preset) / "results.png"))
'''
# processes that are started from a notebook cannot import its functions, so there is one; it may use all cores
CONFIG = 'PRESETS["laptop"]                      # any field: dataclasses.replace(PRESETS["laptop"], seed=1)'
ALONE = 'dataclasses.replace(PRESETS["laptop"], workers=1)'


def percent(script, config=None):
    """The text of a script -> that of a notebook in percent format, `config` being the expression of its Config."""
    text, name = script.read_text(), script.stem
    docstring = ast.get_docstring(ast.parse(text))
    body = text[text.index('"""\n', 3) + 4:text.index('if __name__ == "__main__":')]
    config = config or (ALONE if "\n    workers: int" in body else CONFIG)
    run = "main(cfg)" if "\ndef main(" in body else f'train.experiment("{name}", cfg, measure, plot, work)'
    plain = lambda line: line if line.startswith("    ") else line.replace("_*", r"\_\*")         # no emphasis: s_*
    say = lambda prose: "# %% [markdown]\n" + "".join(f"# {plain(li)}".rstrip() + "\n" for li in prose.splitlines())
    title, _, rest = docstring.partition("\n")
    cells = [say(f"# {title}\n{rest}"), "# %%\n" + SETUP.format(name=name)]
    heading = ""
    for i, part in enumerate(RULE.split(body)):              # code, the comment below a rule, code, ...
        if i % 2:
            first, _, more = "".join(line[2:] + "\n" for line in part.splitlines()).partition("\n")
            heading = f"## {first}\n{more}"
        else:
            cells += [say(heading)] * bool(heading) + [f"# %%\n{part.strip()}\n"] * bool(part.strip())
    cells += [say("## Run it"), "# %%\nimport dataclasses\n\n" + RUN.format(config=config, run=run, name=name)]
    return "\n".join(cells)


def write(script, folder, config=None):
    """-> the path of the notebook. ImportError names the package that is missing."""
    try:
        import jupytext
    except ImportError:
        raise ImportError("notebooks need the package jupytext: .venv/bin/python -m pip install jupytext") from None
    notebook = jupytext.reads(percent(script, config), fmt="py:percent")
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    folder.mkdir(parents=True, exist_ok=True)
    jupytext.write(notebook, path := folder / f"{script.stem}.ipynb")
    return path


if __name__ == "__main__":
    try:
        for script in sorted(ROOT.glob("exp_*.py")):
            print(write(script, Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "notebooks"))
    except (ImportError, OSError) as e:
        sys.exit(f"error: {e}")
