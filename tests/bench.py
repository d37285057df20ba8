"""
How long things take, measured here and printed as one table; never part of the tests.

    python tests/bench.py                 # laptop, tests, score
    python tests/bench.py laptop          # train the default model afresh, then run each experiment on it
    python tests/bench.py exp_toy2d.py    # one experiment
    python tests/bench.py tests           # the test suite
    python tests/bench.py score  # the exact empirical score beside other ways to compute it

Times depend on the machine: quote the ratios, and the machine that the first line names.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIMITS = {"train": 240, "experiment": 180, "test": 300}      # seconds on 2 CPU cores that the project promises


def machine():
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((li.split(":")[1].strip() for li in open("/proc/cpuinfo") if li.startswith("model name")), cpu)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{where}, {os.cpu_count()} cores, torch {torch.__version__}"


def row(name, seconds, note=""):
    print(f"{name:44s} {seconds:9.2f} s  {note}", flush=True)


def timed(*argv):
    started = time.time()
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.time() - started, done.stdout


def remember(seconds):
    """To out/bench.json; `make assets` takes it to assets/, where the README has its minutes from."""
    path = ROOT / "out" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    before = before["seconds"] if before.get("machine") == machine() else {}
    path.write_text(json.dumps(dict(machine=machine(), seconds=before | seconds), indent=1) + "\n")


def experiment(script, folder):
    """One experiment, from nothing but the trained model in folder/run; with its phases, as it prints them."""
    trained = ["--train.out", f"{folder}/run"] if "train: Training" in (ROOT / script).read_text() else []
    seconds, printed = timed(script, *trained, "--out", f"{folder}/{script}")
    row(f"python {script}", seconds, f"promised: under {LIMITS['experiment']} s" if trained else "")
    print("".join(f"    {line}\n" for line in printed.splitlines() if line.endswith(" s") and ": " in line), end="")
    remember({script: round(seconds)})


def laptop():
    """What a reader waits for: training from nothing, then each experiment, which finds the trained model."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = timed("train.py", "--out", f"{folder}/run")
        row("python train.py", seconds, f"promised: under {LIMITS['train']} s")
        remember({"train.py": round(seconds)})
        for script in sorted(p.name for p in ROOT.glob("exp_*.py")):
            experiment(script, folder)


def tests():
    seconds, _ = timed("-m", "pytest")
    row("python -m pytest", seconds, f"promised: under {LIMITS['test']} s")
    remember(dict(tests=round(seconds)))


def score(N=50_000, D=784, B=256):
    """Posterior means of B queries over N points: seconds, beside one bare fp32 product z @ x.T, and the error."""
    from empirical_score import EmpiricalScore
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(64, D, generator=g)
    x = centres[torch.randint(64, (N,), generator=g)] + 0.7 * torch.randn(N, D, generator=g)
    E = EmpiricalScore(x)

    def best(f, n=3):
        f()
        times = []
        for _ in range(n):
            started = time.perf_counter()
            out = f()
            times.append(time.perf_counter() - started)
        return sorted(times)[n // 2], out

    for t in (0.3, 0.95):
        z = (1 - t) * x[torch.randint(N, (B,), generator=g)] + t * torch.randn(B, D, generator=g)
        few = 16                                             # the reference is slow: float64 direct differences
        d2 = torch.stack([(zi - (1 - t) * x.double()).square().sum(1) for zi in z[:few].double()])
        truth = torch.softmax(-d2 / (2 * t * t), 1) @ x.double()
        sq = x.square().sum(1)

        def expanded(z=z, t=t, sq=sq):
            d2 = z.square().sum(1)[:, None] + (1 - t)**2 * sq - 2 * (1 - t) * (z @ x.T)
            return torch.softmax(-d2 / (2 * t * t), 1) @ x

        def cdist(z=z, t=t):
            return torch.softmax(-torch.cdist(z, (1 - t) * x)**2 / (2 * t * t), 1) @ x

        bare, _ = best(lambda z=z: z @ x.T)
        row(f"t = {t}: one bare fp32 product", bare)
        for name, f in (("this project, float64 stream", lambda z=z, t=t: E.posterior_mean(z, t)),
                        ("fp32 expansion, full B x N matrix", expanded), ("torch.cdist + softmax", cdist)):
            seconds, out = best(f)
            error = ((out[:few] - truth).abs().amax(1) / truth.abs().amax(1)).max().item()
            row(f"    {name}", seconds, f"{seconds / bare:6.1f} x the bare product, largest relative error {error:.1e}")


if __name__ == "__main__":
    benches = {"laptop": laptop, "tests": tests, "score": score}
    what, scripts = sys.argv[1:] or list(benches), [p.name for p in ROOT.glob("exp_*.py")]
    if unknown := set(what) - set(benches) - set(scripts):
        sys.exit(f"error: unknown benchmark {min(unknown)!r}: expected {', '.join([*benches, *scripts])}")
    print(machine())
    for name in what:
        benches[name]() if name in benches else experiment(name, ROOT / "out" / "bench")
