"""How long things take, measured here and printed.

    python tests/bench.py figures     # what a new user waits for: `make figures` in a clone of the last commit
    python tests/bench.py tests       # make test
    python tests/bench.py train       # images a second and MFU of train.py
    python tests/bench.py score       # the exact empirical score beside other ways to compute it
    python tests/bench.py growth      # its time against the number of points
    python tests/bench.py gpu         # the same on a GPU, up to 2.56 million points of 4,096 dimensions

Quote ratios, and the machine, which the first line names. `make assets` takes the numbers from out/bench*.json.
"""
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from empirical_score import EmpiricalScore  # noqa: E402
from plumbing.data import load_data, save_dataset  # noqa: E402
from plumbing.fast_score import FastEmpiricalScore  # noqa: E402
from plumbing.results import BLUE, GREY, ORANGE, new_figure, save_figure  # noqa: E402

OUT = ROOT / "out"


def machine(device="cpu"):
    """Return the name of the processor or GPU, the number of cores, and torch's version."""
    name, cpus = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", cpus.read_text(), re.M) if cpus.exists() else []
    name = torch.cuda.get_device_name() if device == "cuda" else (models or [name])[0]
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def keep(file, device="cpu", **values):
    """Add values to a file in out/. What another machine measured goes."""
    path = OUT / file
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    found = found if found.get("machine") == machine(device) else {}
    path.write_text(json.dumps(found | dict(machine=machine(device)) | values, indent=1) + "\n")


def now():
    """Return the time in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(functions, rounds):
    """Return {name: (seconds, result)}: the least of some rounds, in turn, since machines slow down now and then."""
    results = {name: f() for name, f in functions.items()}
    seconds = dict.fromkeys(functions, math.inf)
    for _ in range(rounds):
        for name, f in functions.items():
            started = now()
            f()
            seconds[name] = min(seconds[name], now() - started)
    return {name: (seconds[name], results[name]) for name in functions}


def figures(command=("make", "figures", f"PYTHON={sys.executable}")):
    """Clone, install, train, measure, draw. What the scripts write is left in out/, for `make assets`."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        starts = dict(installation=time.time())
        with subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, text=True) as make:
            for line in make.stdout:
                print(line, end="", flush=True)
                # the Makefile says which script is next
                if line.startswith("== "):
                    starts[line.split()[1].removesuffix(".py")] = time.time()
        ends = [*starts.values(), time.time()][1:]
        if make.returncode:
            sys.exit("error: make figures failed")
        shutil.copytree(clone / "out", OUT, dirs_exist_ok=True)
    seconds = {name: round(end - start) for (name, start), end in zip(starts.items(), ends, strict=True)}
    print("seconds:", seconds)
    keep("bench.json", installation=seconds.pop("installation"), figures=seconds)


def tests(command=("make", "test")):
    started = time.time()
    subprocess.run(command, cwd=ROOT, check=True)
    keep("bench.json", tests=round(time.time() - started))


def training(cfg=train.PRESETS["laptop"], steps=120, rounds=3):
    """Measure images a second and MFU of train.py; on a GPU of SiT-XL/2 on random latents, with its --compile."""
    device, ours = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            x = np.random.default_rng(0).standard_normal((10_000, 4, 32, 32)).astype(np.float16)
            save_dataset(Path(folder) / "latents", dict(x=x, y=np.arange(len(x)) % 1000), dict(num_classes=1000))
            cfg = dataclasses.replace(train.PRESETS["paper"], data=f"{folder}/latents", batch=64, keep=())
        cfg = dataclasses.replace(cfg, steps=steps, log_every=steps // 6, save_every=steps, grid=False)
        for k in range(rounds):
            run = train.train(dataclasses.replace(cfg, out=f"{folder}/{k}"))
            # the first steps warm up
            ours += [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][1:]
    best = max(ours, key=lambda line: line["images_per_second"])
    found = dict(model=cfg.model, batch=cfg.batch) | best
    print("the fastest line of the log:", found)
    keep("bench.json", device.type, train=found)


# ----------------------------------------------------------------------------------------------------------------------
# The exact empirical score

def digits(N):
    """Return the digits over and over, with a little more noise each time: (N, 784)."""
    x = torch.from_numpy(np.array(load_data("mnist5k")["x"])).flatten(1)
    rows = torch.arange(N)
    noise = torch.randn(N, x.shape[1], generator=torch.Generator().manual_seed(1))
    return x[rows % len(x)] + 0.02 * (rows // len(x))[:, None] * noise


def noisy_points(x, t, B):
    """Return B noisy data points, (B, D) in float32."""
    g = torch.Generator(x.device).manual_seed(0)
    rows = torch.randint(len(x), (B,), generator=g, device=x.device)
    eps = torch.randn(B, x.shape[1], generator=g, device=x.device)
    return (1 - t) * x[rows].float() + t * eps


def relative_error(x, z, t, x_star, few=8):
    """Return the largest error of x_star (B, D) by direct differences in float64 of the first queries."""
    z, total = z[:few].double(), 0
    logits = torch.cat([-((z[:, None] - (1 - t) * part.double()).square().sum(2)) for part in x.split(1000)], 1)
    w = torch.softmax(logits / (2 * t**2), 1)
    for w_part, part in zip(w.split(1000, 1), x.split(1000), strict=True):
        total = total + w_part @ part.double()
    return ((x_star[:few] - total).abs().amax(1) / total.abs().amax(1)).max().item()


def peers(x):
    """Return {name: f}, f(z, t) -> x_*, of what is installed."""
    def cdist(z, t):
        return torch.softmax(-torch.cdist(z, (1 - t) * x)**2 / (2 * t**2), 1) @ x

    def attention(z, t):
        # the norms are one more coordinate
        q = torch.cat([z * ((1 - t) / t**2), torch.ones(len(z), 1)], 1)
        k = torch.cat([x, -(1 - t)**2 / (2 * t**2) * x.square().sum(1, keepdim=True)], 1)
        return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], x[None], scale=1.0)[0]

    found = {"torch.cdist + softmax": cdist, "scaled_dot_product_attention": attention}
    if importlib.util.find_spec("faiss"):
        import faiss
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(x.numpy())

        def search(z, t):
            d2, near = index.search((z / (1 - t)).numpy(), min(2048, len(x)))
            w = torch.softmax(-torch.from_numpy(d2) * (1 - t)**2 / (2 * t**2), 1)
            return torch.einsum("bk,bkd->bd", w, x[torch.from_numpy(near)])
        found["faiss flat, 2,048 neighbours"] = search
    return found


def score(N=50_000, B=256, rounds=15):
    """Compare posterior means of B noisy digits over N points: error, and time in multiples of a product z @ x.T."""
    x, table = digits(N), []
    E = FastEmpiricalScore(x)
    slow = {"empirical_score.py, plain float64": EmpiricalScore(x).posterior_mean} | peers(x)
    for t in (0.3, 0.95):
        z = noisy_points(x, t, B)
        done = fastest({"one bare fp32 product": lambda z=z: z @ x.T,
                        "this project": lambda z=z, t=t: E.posterior_mean(z, t),
                        "this project, r_*": lambda z=z, t=t: E.r_star(z, t)[0],
                        "this project, 50 nearest": lambda z=z: E.nearest(z, 50)[0]}, rounds)
        done |= fastest({name: lambda f=f, z=z, t=t: f(z, t) for name, f in slow.items()}, 2)
        bare = done["one bare fp32 product"][0]
        for name, (seconds, result) in done.items():
            error = relative_error(x, z, t, result) if result.shape == z.shape else None
            table.append(dict(t=t, method=name, seconds=seconds, ratio=seconds / bare, error=error))
            note = "" if error is None else f", largest relative error {error:.1e}"
            print(f"t = {t}: {name:40s} {seconds:9.3f} s, {seconds / bare:7.2f} x the bare product{note}", flush=True)
    keep("bench_score.json", peers=table, shape=[N, x.shape[1], B])


def natural_points(N, D, device):
    """Return Gaussian points whose variance falls as 1/j along direction j, as in natural images; on a GPU in bf16."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.empty(N, D, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    scale = torch.arange(1, D + 1, device=device)**-0.5
    for part in x.split(10_000):
        part.copy_(torch.randn(part.shape, generator=g, device=device) * scale * D**0.5 / scale.norm())
    return x


def growth(D=784, counts=(1_000, 10_000, 100_000, 640_000), B=256, device="cpu", file="bench_score", plain_up_to=1e5):
    """Measure seconds of a bare product and of both engines, the error, and the bound on what was left out."""
    every, table = natural_points(max(counts), D, device), []
    for N in counts:
        x = every[:N]
        E, plain = FastEmpiricalScore(x), EmpiricalScore(x, chunk=2**16 if device == "cuda" else 4096)
        for t in (0.3, 0.95):
            z = noisy_points(x, t, B)
            low = z.to(x.dtype)
            functions = dict(product=lambda x=x, z=low: [z @ part.T for part in x.split(2**15)][0],
                             fast=lambda E=E, z=z, t=t: E.posterior_mean_and_bound(z, t))
            if N <= plain_up_to:
                functions["plain"] = lambda E=plain, z=z, t=t: E.posterior_mean(z, t)
            done = fastest(functions, 5 if N * D < 1e8 else 2)
            x_star, bound = done["fast"][1]
            row = dict(D=D, N=N, B=B, t=t, error=relative_error(x, z, t, x_star), bound=bound.max().item())
            table.append(row | {name: float(f"{seconds:.4g}") for name, (seconds, _) in done.items()})
            print(table[-1], flush=True)
    keep(f"{file}.json", device, growth=table)
    draw(table, OUT / f"{file}.png")


def draw(table, path):
    fig, ax = new_figure(3.8)
    for name, t, style, colour, label in (
            ("product", 0.3, ":", "black", "one bare product"), ("plain", 0.3, "-", GREY, "empirical_score.py"),
            ("fast", 0.95, "s-", ORANGE, "fast_score.py, weights spread (t = .95)"),
            ("fast", 0.3, "o-", BLUE, "fast_score.py, weights collapsed (t = .3)")):
        rows = [row for row in table if row["t"] == t and name in row]
        ax.loglog([row["N"] for row in rows], [row[name] for row in rows], style, color=colour, label=label)
    ax.set(xlabel="data points N", ylabel="seconds", title=f"{table[0]['B']} posterior means, d = {table[0]['D']:,}")
    ax.legend()
    save_figure(fig, path)


def gpu():
    if not torch.cuda.is_available():
        sys.exit("error: gpu needs a GPU")
    growth(4096, (1_000, 10_000, 100_000, 1_000_000, 2_562_334), 1024, "cuda", "bench_score_gpu", plain_up_to=1e9)


COMMANDS = dict(figures=figures, tests=tests, train=training, score=score, growth=growth, gpu=gpu)

if __name__ == "__main__":
    if len(sys.argv) < 2 or set(sys.argv[1:]) - set(COMMANDS):
        sys.exit(f"error: expected one or more of {', '.join(COMMANDS)}")
    print(machine())
    for name in sys.argv[1:]:
        COMMANDS[name]()
