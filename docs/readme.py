"""Write README.md and docs/*.md from docs/templates and assets/*.json: python docs/readme.py

No number in them is typed. In a template, {{name argument ...}} is replaced by what the function of that name below
returns.
"""
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("exp_toy2d", "exp_gaussian", "exp_cfg_paradox", "exp_shells", "exp_freedom", "exp_scaling")
VERDICTS = {
    "reproduces": "the interval is on the paper's side",
    "not resolved": "the interval holds both", "other regime": "a gate is not passed", "differs": "on the other side"}


def load(name):
    path = ROOT / "assets" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else dict(claims=[], seconds=0)


def find_row(script, id):
    rows = {row["id"]: row for row in load(script)["claims"]}
    if id not in rows:
        raise ValueError(f"assets/{script}.json has no row {id!r}: it has {', '.join(rows)}")
    return rows[id]


def number(value):
    """Return a number with three significant digits, without a leading zero."""
    text = f"{value:.3g}"
    return re.sub(r"^(-?)0\.", r"\1.", text)


def interval(row):
    return f"{number(row['ours'])} [{number(row['ci95'][0])}, {number(row['ci95'][1])}]"


# ---- what a template can ask for -------------------------------------------------------------------------------------

def ours(script, id):
    """The value of a row with its interval."""
    return interval(find_row(script, id))


def value(script, id):
    return number(find_row(script, id)["ours"])


def verdict(script, id):
    return find_row(script, id)["verdict"]


def row(script, id, picture):
    """A row of the table of results."""
    r = find_row(script, id)
    note = f": {r['note']}" if r["note"] else ""
    return (f"| {r['text'].replace('|', chr(92) + '|')} | {r['paper']} | {interval(r)} | {r['verdict']}{note} | "
            f"[picture](assets/{picture}.png) |")


def verdicts():
    return "; ".join(f"*{name}*, {meaning}" for name, meaning in VERDICTS.items())


def minutes(*names):
    """Minutes of scripts on the machine of assets/bench.json, all of them without a name."""
    seconds = load("bench")["figures"]
    total = sum(seconds[name] for name in (names or seconds))
    return f"{max(1, math.ceil(total / 60))} minute" + ("s" if total > 60 else "")


def machine():
    return load("bench")["machine"]


def claims():
    """Every row of every experiment."""
    lines = []
    for script in EXPERIMENTS:
        found = load(script)
        lines += [f"## {script}.py", "", "| id | statement | paper | ours [95%] | verdict |", "|---|---|---|---|---|"]
        for r in found["claims"]:
            note = f": {r['note']}" if r["note"] else ""
            text = r["text"].replace("|", r"\|")
            lines.append(f"| {r['id']} | {text} | {r['paper']} | {interval(r)} | {r['verdict']}{note} |")
        lines.append("")
    return "\n".join(lines)


def score():
    """The empirical score beside its peers, in multiples of one bare product."""
    bench = load("bench_score")
    n, d, queries = bench["shape"]
    at = {(p["method"], p["t"]): p for p in bench["peers"]}
    one = at["one bare fp32 product", 0.3]["seconds"]
    lines = [f"{n:,} digits of {d} dimensions, {queries} queries; times in multiples of one bare fp32 product "
             f"({one:.2f} s), and the largest relative error. {bench['machine']}.", "",
             "| | weights collapsed, t = .3 | weights spread, t = .95 |", "|---|---|---|"]
    for name in dict.fromkeys(p["method"] for p in bench["peers"]):
        cells = []
        for t in (0.3, 0.95):
            p = at.get((name, t))
            error = f", {p['error']:.0e}" if p and p["error"] else ""
            cells.append(f"{p['ratio']:.2f} x{error}" if p else "")
        if name != "one bare fp32 product":
            lines.append(f"| {name.replace('this project', 'fast_score.py')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def targets():
    """The targets of exp_freedom.py beside each other: the SiT in the smallest region and in the largest."""
    columns = ("fig5/generalizes/sit", "fig5/memorizes/sit", "fig5/smallest", "fig5/largest", "fig5/agree")
    found = load("targets")["targets"]
    lines = ["| target | " + " | ".join(found["exact"]["rows"][id]["text"] for id in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for name, target in found.items():
        cells = [interval(target["rows"][id]) for id in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def thresholds():
    """The fraction of copies of Figure 5's SiT by threshold and ratio."""
    found = load("targets")
    exact = found["targets"]["exact"]
    lines = ["| threshold | " + " | ".join(f"ratio {ratio:g}" for ratio in exact["ratios"]) + " |"]
    lines.append("|---" * (1 + len(exact["ratios"])) + "|")
    for threshold, copies in zip(found["thresholds"], exact["copies"], strict=True):
        lines.append(f"| {threshold:g} | " + " | ".join(number(c) for c in copies) + " |")
    return "\n".join(lines)


def scale():
    """What the presets gpu and paper cost, by counts of FLOPs."""
    costs = load("costs")
    lines = [costs["assumed"], "", "| command | networks | FLOPs | GPU-hours of training | memory of a GPU | disk |",
             "|---|---|---|---|---|---|"]
    for c in costs["rows"]:
        lines.append(f"| `{c['command']}` | {c['networks']} | {c['flops']:.1e} | {c['hours']:.3g} | "
                     f"{c['memory']:.3g} GB | {c['disk']:.3g} GB |")
    return "\n".join(lines)


FUNCTIONS = (ours, value, verdict, row, verdicts, minutes, machine, claims, score, targets, thresholds, scale)
ASKED = {f.__name__: f for f in FUNCTIONS}


def fill(template):
    def replace(match):
        name, *arguments = match[1].split()
        return ASKED[name](*arguments)
    return re.sub(r"\{\{(.+?)\}\}", replace, template)


def pages():
    """Return {path: text} of all that is written."""
    out = {}
    for template in sorted((ROOT / "docs" / "templates").glob("*.md")):
        path = ROOT / template.name if template.name == "README.md" else ROOT / "docs" / template.name
        out[path] = fill(template.read_text())
    return out


if __name__ == "__main__":
    try:
        for path, text in pages().items():
            path.write_text(text)
            print(path.relative_to(ROOT))
    except (ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
