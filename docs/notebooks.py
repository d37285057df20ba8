"""Write each experiment as a notebook: python docs/notebooks.py [FOLDER]

The paragraphs of the docstring become cells of prose, every function a cell of code, below a comment that stands above
it as prose. So there is no second copy to keep. Notebooks go to out/notebooks/, and run there.
"""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = """import sys
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "{name}.py").exists())
sys.path.insert(0, str(ROOT))"""
# workers are processes, which cannot import the functions of a notebook: it computes in this one
RUN = """import dataclasses

cfg = dataclasses.replace(PRESETS["laptop"], {changes})
{call}"""
SHOW = """from IPython.display import Image, display

for picture in sorted((Path(cfg.out) if cfg.out else ROOT / "out" / "{name}" / cfg.preset).glob("*.png")):
    display(Image(str(picture)))"""


def prose(text):
    lines = []
    for line in text.splitlines():
        # an exercise's command is code; so are lines that are set in by four spaces; s_* is no emphasis
        line = re.sub(r"^(\d\. )(python .+?)  +", r"\1`\2` ", line)
        lines.append(line if line.startswith("    ") else line.replace("_*", r"\_\*"))
    return dict(cell_type="markdown", metadata={}, source="\n".join(lines))


def code(text):
    return dict(cell_type="code", metadata={}, execution_count=None, outputs=[], source=text.strip("\n"))


def comment_above(lines, first):
    """Return the comment that stands above a line, without its marks and rules."""
    found = []
    while first > 0 and (lines[first - 1].startswith("#") or not lines[first - 1].strip()):
        first -= 1
        found.insert(0, lines[first])
    # the list of packages, for `uv run`, is no prose
    text = re.sub(r"# /// script.*?# ///", "", "\n".join(found), flags=re.DOTALL)
    return "\n".join(line.strip("#- ") for line in text.splitlines() if line.strip("#- "))


def cells_of(path, changes=""):
    """Return the cells of a script; `changes` are the fields of its config, as code, that its run changes."""
    text = path.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    title, *paragraphs = ast.get_docstring(tree).split("\n\n")
    cells = [prose(f"# {title}"), *map(prose, paragraphs), code(SETUP.format(name=path.stem))]
    for node in tree.body[1:]:
        if isinstance(node, ast.If):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        source, comment = "\n".join(lines[first:node.end_lineno]), comment_above(lines, first)
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if comment:
            cells.append(prose(comment))
        # imports and constants that follow each other share a cell
        if not is_definition and not comment and cells[-1].get("shared"):
            cells[-1]["source"] += "\n" + source
        else:
            cells.append(code(source) | dict(shared=not is_definition))
    if "\n    workers: int" in text:
        changes = ", ".join(filter(None, [changes, "workers=1"]))
    call = "main(cfg)"
    for node in tree.body[-1].body:
        # below `if __name__ == "__main__"`, what the command runs may get its name
        if isinstance(node, ast.Assign):
            call = f"{ast.unparse(node)}\n{node.targets[0].id}(cfg)"
    cells += [prose("## Run it"), code(RUN.format(changes=changes, call=call)), code(SHOW.format(name=path.stem))]
    for number, cell in enumerate(cells):
        cell.pop("shared", None)
        cell["id"] = f"cell{number}"
    return cells


def write_notebook(path, folder, changes=""):
    """Write the notebook of a script and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{path.stem}.ipynb"
    kernel = dict(name="python3", display_name="Python 3", language="python")
    out.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel),
                                   cells=cells_of(path, changes)), indent=1))
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "notebooks"
    for script in sorted(ROOT.glob("exp_*.py")):
        print(write_notebook(script, target))
