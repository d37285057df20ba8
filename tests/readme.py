"""Regenerate what the README takes from assets/*.json, so that no number in it is typed: python tests/readme.py

Between <!-- NAME --> and <!-- /NAME --> in README.md stands the output of the function NAME below.
"""
import ast
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {"exp_shells": "1b, 4", "exp_cfg_paradox": "2", "exp_freedom": "5", "exp_scaling": "3, 6, 7",
           "exp_toy2d": "9, 11", "exp_gaussian": "10"}
# What the gallery shows of each: a title, pictures, what to see in them, and {in short: how its claim begins}. What
# came out is not said here: that follows from the verdicts.
GALLERY = {
    "exp_shells": (
        "Shells", ("exp_shells.gif",),
        "The figure at the top, in motion: distance r_\\* to the nearest shell, of noisy training points (blue) and "
        "of sampling trajectories (orange-red). Dashed, the control: images that no model was trained on, noised "
        "afresh.",
        {"C1, training points lie on shells": "C1 training points lie", "and new images outside": "C1 a restricted",
         "C2, sampling leaves them": "C2 sampling", "for most of its time": "C2 mostly",
         "memorization until t = .5": "Fig 4 memorization ratio at t = 0.5",
         "memorization until t = .75": "Fig 4 memorization ratio at t = 0.75",
         "shells of a class apart until t = .8": "Fig 4 the closest",
         "control: at the same t as their own images, noised afresh": "control: trajectories leave where",
         "and before new real images": "control: trajectories leave before new"}),
    "exp_cfg_paradox": (
        "The paradox of guidance", ("exp_cfg_paradox.png",),
        "Guidance feeds on the gap between conditional and unconditional score. The paper shows that of the empirical "
        "score on training points (blue, solid) and of the learned one on trajectories (orange-red, dashed); the two "
        "lines marked control are the missing half.",
        {"no empirical gap on training points": "Fig 2 empirical",
         "a learned gap on trajectories beyond the network's error": "Fig 2 learned",
         "control: on training points half of it at most": "control: learned gap, training points"}),
    "exp_freedom": (
        "Freedom of extrapolation", ("exp_freedom.png",),
        "On digits of 8 x 8: the target is the empirical score of a subset, D_score; the network is asked for it at "
        "noisy images of a larger and larger set, D_region: are more samples copies then (blue)? Real images that are "
        "not in D_score (green) show what is near to one of its images, but no copy: 5% of them. The control (black) "
        "is ordinary training on the same images.",
        {"C3, for the transformer": "C3 SiT", "C3, for the U-Net": "C3 UNet",
         "at 8 times, more copies than among real images": "C3 at ratio 8, SiT",
         "the same after more steps": "C3, 1,800 steps, ratio 8", "at ratio 1 no more than among them":
         "C3, 1,800 steps, ratio 1",
         "control: plain training does not copy more": "control, plain DSM, SiT-micro/4: the same",
         "nor what it was trained on itself": "control, plain DSM, SiT-micro/4: copies",
         "sampled and exact targets agree": "targets: fraction of copies with sampled"}),
    "exp_scaling": (
        "Selective underfitting, REPA and the scaling law", ("exp_scaling.png", "exp_scaling_when.png"),
        "First picture: both errors against compute, for networks that all see the same points and noise; what REPA "
        "changes, and what another seed does; Fréchet distance against L. Second picture: the search for data and "
        "lengths of training where the second error grows.",
        {"supervision error falls with compute": "Fig 3 supervision error per decade",
         "extrapolation error grows": "Fig 3 extrapolation error per decade",
         "REPA changes more on trajectories": "Fig 6 change by REPA", "greatly so": "Fig 6 the same ratio, ",
         "control: more so than another seed": "Fig 6 control",
         "on training points it changes less than another seed": "Fig 6 on training points",
         "REPA hardly changes L": "Fig 7b L with REPA", "it is better at equal L": "Fig 7b FD at equal L, REPA 1",
         "U-Nets are better at equal L": "Fig 7c FD at equal L, U-Net, attention",
         "U-Nets have a higher L at equal compute": "Fig 7c L at equal compute, middle, U-Net, attention",
         "at the most compute too": "Fig 7c L at equal compute, most, U-Net, attention"}),
    "exp_toy2d": (
        "Perception-aligned training", ("exp_toy2d.png", "exp_toy2d.gif"),
        "Four training points on a line, two on each side: samples between the sides are bad (orange-red), those "
        "between the two points of a side good (green). Perception-aligned training (PAT) tells the model of the "
        "sides: P1 by polar coordinates, P2 by a kernel on polar features, P3 by an equivariant network, which cannot "
        "fit the four points, so its good samples come of misfit too. C4 is about samples at equal loss "
        "(stars): P2 has it at every bandwidth, P3 against a baseline that stops early, P1, which diffuses in another "
        "space, not at all. That a sample within .1 of a point is a copy is our choice, and P1's \"more good ones\" "
        "hangs on it.",
        {f"P{k}, {what}": f"P{k} {start}" for k in (1, 2, 3)
         for what, start in (("fewer bad samples", "fewer bad"), ("more good ones", "more good"))} |
        {f"{pair}: {what}": f"{pair}: {start}" for pair in (*(f"P2 equal L, h={h}" for h in (0.5, 1, 2)), "P3 equal L")
         for what, start in (("fewer bad samples", "fewer bad"), ("more good ones", "more good"))}),
    "exp_gaussian": (
        "A Gaussian, whose true score is known", ("exp_gaussian.png",),
        "Error to the empirical score s_\\* (solid) and to the true one, s_gt (dashed), on noisy training points "
        "(blue) and on fresh points of the same density (orange-red): which of the two has the network "
        "learned, and where?",
        {"on training points nearer to s_\\*": "Fig 10 N = 100, supervision",
         "on fresh points nearer to s_gt": "Fig 10 N = 100, true",
         "on fresh points s_gt is approached to the end": "Fig 10 true p_t: s_gt",
         "on training points the error to s_gt plateaus": "Fig 10 supervision: error"}),
}


def load(name):
    return json.loads((ROOT / "assets" / f"{name}.json").read_text())


def minutes(seconds):
    return "1 minute" if seconds <= 60 else f"{math.ceil(seconds / 60)} minutes"


def claims(script, start=""):
    """The claims of an experiment that begin so."""
    return [c for c in load(script)["claims"] if c["claim"].startswith(start)]


def one(script, start):
    """The one claim that begins so."""
    (found,) = claims(script, start)
    return found


def beside(script, found):
    """Pairs of a claim as the assets have it and as another run found it; a row may be newer than that run."""
    there = {c["claim"]: c for c in found}
    return [(c, there[c["claim"]]) for c in claims(script) if c["claim"] in there]


def outcome(c):
    """What came out of a claim, as cells of a table: the number, the verdict."""
    verdict = c["verdict"] if c["verdict"] == "holds" else f"**{c['verdict']}**"
    return "{:.3g} ({:.3g} to {:.3g}) | {}".format(c["ours"], *c["ci95"], verdict)


def cells(c, *after_claim):
    """A claim as cells of a table: what is claimed, what the paper has, what came out."""
    return " | ".join([c["claim"].replace("|", "\\|").replace("*", "\\*"), *after_claim, c["paper"], outcome(c)])


def gallery():
    """Every figure, what to see in it, and what came out."""
    parts = []
    for script, (title, pictures, sentence, short) in GALLERY.items():
        verdicts = {}
        for what, start in short.items():
            verdicts.setdefault(one(script, start)["verdict"], []).append(what)
        came = " ".join(f"**{v[0].upper()}{v[1:]}**: {'; '.join(verdicts[v])}."
                        for v in ("holds", "not resolved", "contradicted") if v in verdicts)
        parts += [f"### {title} (`{script}.py`, Fig. {FIGURES[script]})", f"{sentence} {came}",
                  *(f"![{title}](assets/{picture})" for picture in pictures)]
    return "\n\n".join(parts)


def table():
    """The claims of the gallery in numbers, with what it takes to see them."""
    rows = ["| experiment | claim | command | paper | ours (95% interval) | verdict | time |",
            "|---|---|---|---|---|---|---|"]
    for script, (*_, short) in GALLERY.items():
        for i, start in enumerate(short.values()):
            figure, command, took = (f"Fig. {FIGURES[script]}", f"`python {script}.py`",
                                     minutes(load(script)["seconds"])) if i == 0 else ("", "", "")
            rows.append(f"| {figure} | {cells(one(script, start), command)} | {took} |")
    return "\n".join(rows)


def results():
    """All claims, folded away."""
    rows = [f"| {script}.py | {cells(c)} |" for script in FIGURES for c in claims(script)]
    return "\n".join([f"<details><summary>All {len(rows)} claims and controls</summary>", "",
                      "| experiment | claim | paper | ours (95% interval) | verdict |", "|---|---|---|---|---|", *rows,
                      "", "</details>"])


def rerun():
    """The same claims on a second machine, assets/rerun.json, whose rounding leads training elsewhere."""
    again = load("rerun")
    assert again["machine"] != load("bench")["machine"], "assets/rerun.json is of the first machine"
    both = [pair for script, found in again["claims"].items() for pair in beside(script, found)]
    newer = sum(len(claims(script)) for script in FIGURES) - len(both)
    other = [(a, b) for a, b in both if a["verdict"] != b["verdict"]]
    within = sum(a["ci95"][0] - 1e-6 <= b["ours"] <= a["ci95"][1] + 1e-6 for a, b in both)
    text = (f"Every experiment ran again on a second machine ({again['machine']}), whose rounding differs, and with "
            f"it what is trained: {len(both) - len(other)} of {len(both)} verdicts are the same, and {within} of the "
            "numbers lie within the intervals above." +
            f" {newer} claims are newer than that run." * (newer > 0))
    if other:
        rows = [f"| {cells(a)} | {outcome(b)} |" for a, b in other]
        text += "\n".join([" The others:", "", "| claim | paper | above | verdict | second run | verdict |",
                           "|---|---|---|---|---|---|", *rows])
    return text


def times():
    """The two commands, and when which figure appears; what has not been measured is left out."""
    bench = load("bench")
    at, tests = bench.get("figures"), bench.get("tests")
    took = lambda seconds: f": {minutes(seconds)}" if seconds else ""
    lines = ["```bash", "make figures    # sets up .venv, trains the default model, runs every experiment"
             + took(at and max(at.values())), "make test       # sets up .venv, runs the tests" + took(tests), "```"]
    if at:
        both = max(at["exp_shells"], at["exp_cfg_paradox"])
        lines += ["", f"Measured on {bench['machine']}, after the installation, which took "
                  f"{minutes(bench['installation'])}. The first figure is there within {minutes(min(at.values()))}, "
                  "those of exp_cfg_paradox.py and exp_shells.py, with the training of the default model, within "
                  f"{minutes(both)}."]
    return "\n".join(lines)


def controls():
    """What the two controls say, in the figures of the last run."""
    leaves, beyond = load("exp_shells")["arrays"]["leaves"], load("exp_cfg_paradox")["arrays"]["beyond"]
    gap, ratio = one("exp_cfg_paradox", "Fig 2 learned"), one("exp_cfg_paradox", "control: learned gap, training")
    interval = lambda c: f"{c['ours']:.2f} (95%: {c['ci95'][0]:.2f} to {c['ci95'][1]:.2f})"
    return (f"Half of the trajectories have left the shells at t = {leaves['inference']:.2f}; of the images that they "
            f"lead to, noised afresh, at t = {leaves['generated']:.2f}; of held-out images at t = "
            f"{leaves['heldout']:.2f}. For t <= .5 the learned gap on trajectories is {interval(gap)} times the "
            f"network's error on training points, and on training points {interval(ratio)} times as large as on "
            f"trajectories; at {100 * beyond:.0f}% of the trajectories' points the empirical gap is larger than the "
            "learned one.")


def score():
    """The empirical score beside its peers, collapsed and spread, in multiples of a bare product."""
    bench = load("bench_score")
    N, D, B = bench["shape"]
    at = {(p["method"], p["t"]): p for p in bench["peers"]}
    cell = lambda p: f"{p['ratio']:.2f} x" + (f", {p['error']:.0e}" if p["error"] else "") if p else ""
    one = at["one bare fp32 product", 0.3]["seconds"]
    rows = [f"{N:,} digits of {D} dimensions, {B} queries; times in multiples of one bare fp32 product ({one:.2f} s), "
            f"and the largest relative error. {bench['machine']}.", "",
            "| | weights collapsed, t = .3 | weights spread, t = .95 |", "|---|---|---|"]
    for name in dict.fromkeys(p["method"] for p in bench["peers"]):
        if name != "one bare fp32 product":
            bold = "**" if name == "this project" else ""
            rows.append(f"| {bold}{name}{bold} | {cell(at.get((name, 0.3)))} | {cell(at.get((name, 0.95)))} |")
    each = ", ".join(f"{p['ratio']:.2f} at t = {t:g}" for (name, t), p in at.items() if name == "this project")
    largest = {c["D"]: c for c in bench["growth"] if c["t"] == 0.3}
    gains = ", ".join(f"{c['posterior mean'] / c['fp32 product']:.2f} for {c['N']:,} of {D:,} dimensions"
                      for D, c in largest.items())
    first = bench["ranks"][0]
    ranks = ", ".join(f"{r['one'] / r['two']:.2f} times as fast at t = {r['t']} ({r['one'] / r['two_points']:.2f} "
                      "times with the points divided, not the queries)" for r in bench["ranks"])
    ranks = (f"Compared with one process of one thread, two are {ranks}, for {first['B']:,} queries and "
             f"{first['N']:,} digits; the bare product, divided alike, is "
             f"{first['product'] / first['two_product']:.2f} times as fast.")
    memory, most = bench["memory"], max(m["MiB"] for m in bench["memory"])
    directions = bench["setup"]["directions"]
    directions = f" and {directions:.1f} s to find their directions" if directions else ""
    gpu = "On a GPU: not run yet; `python tests/bench.py gpu` does."
    if (ROOT / "assets" / "bench_score_gpu.json").exists():
        found = load("bench_score_gpu")
        last = [r for r in found["table"] if r["N"] == found["table"][-1]["N"]]
        gpu = (f"On {found['machine']}, {last[0]['B']:,} queries over {last[0]['N']:,} bf16 points of {last[0]['D']:,} "
               "dimensions take, in bare bf16 products, " +
               ", ".join(f"{r['mean'] / r['product']:.2f} ({r['mean']:.2g} s) at t = {r['t']:g}" for r in last) + ".")
    rows += ["", f"In multiples of the bare product it takes {each}; and once, for all queries, "
             f"{bench['setup']['points']:.1f} s to read the points{directions}. With more points it gains: {gains} "
             "(Gaussian points in bf16, t = .3, which the bare fp32 product converts first; the variance of direction "
             "j falls as 1/j, as in natural images). "
             f"{ranks} Beside the data, posterior means, "
             f"r_\\* and neighbours of {memory[0]['B']:,} queries took at most {most} MiB, for "
             f"{' and '.join(format(m['N'], ',') for m in memory)} points. {gpu}"]
    return "\n".join(rows)


RATE, TF32 = 0.4 * 989e12, 2     # FLOP/s assumed of an H100, in bf16; networks are evaluated in TF32, at half of it


def size(n):
    return f"{n / 1e9:.0f} GB" if n > 1e9 else f"{n / 1e6:.0f} MB"


def gpu():
    """What the gpu presets take, from counts of FLOPs, and that none was run."""
    where = load("presets")["gpu"]["exp_toy2d"]["machine"].rpartition(", ")[0]
    rows = [f"Minutes are counts of FLOPs at an assumed {RATE / 1e12:.0f} TFLOP/s, 40% of an H100's in bf16, which "
            "networks so small do not reach: expect more. Those of the last two rows are what their dry runs say on "
            f"{where}.", "",
            "| `gpu` preset | networks | minutes, at least | memory | disk | status |", "|---|---|---|---|---|---|"]
    for script, r in load("presets")["gpu"].items():
        work = r["training"] + TF32 * r["sampling"] + r["score"] if "training" in r else 0
        took = f"{r['minutes']:.0f} on a CPU" if "minutes" in r else f"{work / RATE / 60:.0f}"
        status = "not run: no GPU was at hand"
        if (ROOT / "assets" / f"{script}_gpu.json").exists():
            done = load(f"{script}_gpu")
            both = beside(script, done["claims"])
            same = sum(a["verdict"] == b["verdict"] for a, b in both)
            where = done["device"].replace("cpu,", "a CPU,")
            status = (f"run on {where}, in {minutes(done['seconds'])}: {same} of {len(both)} verdicts as "
                      f"above ([figure](assets/{script}_gpu.png))")
        cells = [f"`python {script}.py --preset gpu`", r["networks"], took, size(r["memory"]), size(r["disk"]), status]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def paper():
    """What the paper presets take, from counts of FLOPs, and what the paper has to compare with."""
    published = {
        "train": "nothing; the experiments below use it",
        "exp_shells": "r_\\* near 1 on training points, above 1 when sampling; memorization until t about .8",
        "exp_cfg_paradox": "empirical gap 0, learned gap above 0",
        "exp_freedom": "copies at ratio 1, 2, 3, 4, 8, 25.6: .08 .41 .67 .76 .82 .85; U-Net-B (without 3): 0 .01 .05 "
                       ".59 .80",
        "exp_scaling": "E^sup .1875 to .1834, E^ext .5340 to .5359 from S to XL; FID 59, 37, 20 for S, B, L",
        "exp_gaussian": "s_\\* is nearer than s_gt on training points, and farther on fresh ones",
        "exp_toy2d": "P1 to P3: fewer bad samples, more good ones, both L nearly 0"}
    hours = lambda flops: format(flops / RATE / 3600, ",.0f" if flops / RATE > 36_000 else ".1f")
    where = load("presets")["paper"]["exp_toy2d"]["machine"].rpartition(", ")[0]
    rows = ["Not run here: no such GPU was at hand. The hours are counts of FLOPs (torch.utils.flop_counter) at an "
            f"assumed {RATE / 1e12:.0f} TFLOP/s, 40% of an H100's in bf16, for sampling, in TF32, half of that; "
            "`--dry-run`, once the data are there, measures your machine's own. Memory is that of a GPU, with the "
            "largest network's activations and the data on it; train.py's on four GPUs, which divide the batch. The "
            f"last two rows are what their dry runs say on {where}.", "",
            "| command | networks | GPU-hours: training | sampling | empirical score | memory | disk | published |",
            "|---|---|---|---|---|---|---|---|"]
    for script, r in load("presets")["paper"].items():
        # the two small ones: measured by their dry runs, on a CPU
        took = [f"{r['minutes'] / 60:.1f} h on a CPU", "", ""] if "minutes" in r else \
            [*map(hours, (r["training"], TF32 * r["sampling"], r["score"]))]
        cells = [f"`python {script}.py --preset paper`", r["networks"], *took, size(r["memory"]), size(r["disk"]),
                 published[script]]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def imported():
    """{file: the project's files that it imports}, read off the sources, without those that another of them imports."""
    files, needs = {p.stem: p for p in sorted(ROOT.glob("*.py"))}, {}
    for stem, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        needs[stem] = files.keys() & (names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)})
    below = lambda stem: needs[stem].union(*map(below, needs[stem]))
    return {stem: sorted(n for n in mine if not any(n in below(m) for m in mine)) for stem, mine in needs.items()}


def code_map():
    """What imports what, and which figures come from where, as a mermaid chart, which GitHub draws."""
    what = {"model": "SiT, U-Net", "empirical_score": "the exact target", "sample": "the ODE",
            "train": "the trainer; intervals, results.json"}
    label = lambda stem: f"{stem}.py<br/>" + (what.get(stem) or f"Fig. {FIGURES[stem]}")
    graph = imported()
    rows = [f'    {stem}["{label(stem)}"]' for stem in (*what, *FIGURES)]
    rows += [f"    {need} --> {stem}" for stem in (*what, *FIGURES) for need in graph[stem]]
    rows += ['    figures[/"out/EXPERIMENT/PRESET/<br/>results.json, results.png"/]',
             '    shown[/"assets/, README.md"/]',
             f"    {' & '.join(FIGURES)} --> figures", "    figures -- make assets --> shown"]
    return "\n".join(["```mermaid", "flowchart LR", *rows, "```"])


def trust():
    """What the tests try, counted in the tests themselves."""
    sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "tests")) if p not in sys.path]
    import test_data
    import test_faults
    import test_fuzz
    import test_hostile
    import test_imagenet
    import test_sample
    import test_tutorial
    refused = len(test_hostile.CASES) + len(test_data.BAD_MNIST) + len(test_data.BAD_CIFAR10)
    numbers = sum("=" in case for case in test_hostile.CASES if ".py --" in case)
    return "\n".join([
        f"- **Killed, a run goes on.** Training killed {test_faults.KILLS} times and more, at random moments, ends "
        "with the weights, the optimizer and the log of a run that was left alone, bit for bit (on a CPU, on as many "
        f"processes). The same for a sweep of exp_scaling.py, killed {test_faults.SWEEP_KILLS} times and more; for "
        f"images into an .npz, killed at each of more than {test_sample.MOMENTS} moments; and for `data/prepare.py "
        f"imagenet`, at each of more than {test_imagenet.MOMENTS}. SIGTERM and Ctrl-C save first.",
        "- **Never half a file.** What is written goes into place whole. The last two checkpoints are kept; a damaged "
        "one is found by its checksums, and the one before it taken. A full disk leaves what was there.",
        f"- **Bad input is refused**, in one line that names the file or the flag, with exit status 1, and nothing "
        f"changed: {refused} cases, {numbers} of them sizes and rates (negative, zero, nan, huge), the others pickle "
        "bombs, damaged archives, headers that claim terabytes, wrong labels, nan in the data, mistyped flags, folders "
        "that take no files, sizes beyond the memory. `--debug` shows the traceback.",
        f"- **No file is trusted.** {test_fuzz.INPUTS} made-up checkpoints, data sets and archives are refused, or "
        f"read, soon and in little memory, whenever the tests run, and {test_fuzz.MANY:,} by `FUZZ={test_fuzz.MANY} "
        ".venv/bin/python -m pytest tests/test_fuzz.py`. Nothing is ever unpickled but tensors and plain values.",
        f"- **Run twice, the same.** Each of the {len(test_tutorial.TINY)} experiments, at a small size with the same "
        "seed on one thread of one machine, gives the same numbers and the same picture, bit for bit."])


def render(text):
    parts = {"times": times, "gallery": gallery, "table": table, "results": results, "rerun": rerun,
             "controls": controls, "score": score, "map": code_map, "gpu": gpu, "paper": paper, "trust": trust}
    for name, f in parts.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        assert pattern.search(text), f"README.md lacks <!-- {name} --> .. <!-- /{name} -->"
        text = pattern.sub(lambda m, f=f: f"{m[1]}{f()}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
