"""Everything on a device that is not there, see elsewhere.py: that nothing mixes places, uses float64 on a Mac's GPU,
or comes out otherwise than on the CPU."""
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from test_experiments import MODEL
from test_experiments import TINY as TINY_FIGURES
from test_freedom import TINY as TINY_FREEDOM
from test_imagenet import Dino, Net, imagenet, prepare, write_images
from test_scaling import TINY as TINY_SCALING
from test_toy2d import TINY as TINY_TOY

import empirical_score as es
import train
from empirical_score import EmpiricalScore

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.backends.cuda.matmul.allow_tf32 = False            # pick_device sets it


@pytest.fixture(params=["cuda", "mps"])
def kind(request, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "data")])
    with elsewhere(request.param):
        yield request.param


def test_the_device_refuses_what_a_real_one_does(kind):
    a, b, linear = torch.ones(3, device=kind), torch.ones(3), torch.nn.Linear(3, 3).to(kind)
    at = lambda x: x.device.type
    assert [at(x) for x in (a, a + 1, a[0], a.new_zeros(2), a.view(3, 1), b.to(kind), b.to(a), linear(a))] == [kind] * 8
    assert [at(x) for x in (b, a.cpu(), a.to("cpu"), torch.from_numpy(np.ones(2)))] == ["cpu"] * 4
    linear(a).sum().backward()
    assert at(linear.weight.grad) == kind and (a.is_cuda, a.is_mps, a.is_cpu) == (kind == "cuda", kind == "mps", False)
    a[:2] = b[:2]                                            # a copy; and indices may come from the CPU
    assert at(a[torch.tensor([0])]) == kind and float(a.sum() + torch.tensor(1.0)) == 4
    g = torch.Generator(kind).manual_seed(0)
    assert at(torch.rand(3, generator=g, device=kind)) == kind
    for f in (lambda: a + b, lambda: torch.cat([a, b]), lambda: linear(b),
              lambda: b[torch.zeros(1, device=kind).long()], lambda: a.index_select(0, torch.tensor([0])),
              lambda: torch.rand(3, generator=g), lambda: torch.rand(3, generator=torch.Generator(), device=kind)):
        with pytest.raises(RuntimeError):
            f()
    with pytest.raises(TypeError):
        a.numpy()
    if kind == "mps":
        for f in (a.double, lambda: torch.zeros(1, dtype=torch.float64, device=kind), lambda: b.double().to(kind)):
            with pytest.raises(TypeError, match="float64"):
                f()


@pytest.mark.parametrize("dtype, small, low", [
    (torch.float32, es.SMALL, torch.float32), (torch.float32, 0, torch.float32), (torch.float32, 0, torch.bfloat16),
    (torch.float16, 0, torch.bfloat16), (torch.bfloat16, 0, torch.bfloat16), (torch.float16, 0, torch.float16)])
def test_the_empirical_score(kind, dtype, small, low, monkeypatch):
    if (kind, low) == ("mps", torch.float16): pytest.skip("fp16 is for GPUs whose products of it come in fp32")
    monkeypatch.setattr(es, "SMALL", small)
    monkeypatch.setattr(es, "low_precision", lambda *_: low)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 10
    x = (2 * torch.randn(10, 3, 4, 4, generator=g)[y] + torch.randn(600, 3, 4, 4, generator=g)).to(dtype)
    truth = EmpiricalScore(x.double(), y)
    for E in (EmpiricalScore(x.to(kind), y.to(kind)), EmpiricalScore(x, y, device=kind)):
        for t in (0.3, 0.95):
            z = (1 - t) * x[:20].float() + t * torch.randn(20, 3, 4, 4, generator=g)
            z_there, t_there = z.to(kind), torch.full((20,), t).to(kind)
            for label in (None, y[:20]):
                for name in ("score", "effective_size"):
                    want, got = getattr(truth, name)(z.double(), t, label), getattr(E, name)(z_there, t_there, label)
                    assert got.device.type == kind
                    assert (got.cpu() - want).abs().max() < 2e-5 * max(1, want.abs().max()), (name, t)
                drawn = E.sample_posterior(z_there, t, label, torch.Generator(kind).manual_seed(1))
                again = E.sample_posterior(z, t, label, torch.Generator().manual_seed(1))
                assert drawn.device.type == kind
                assert kind == "mps" or torch.equal(drawn.cpu(), again)  # there, from numbers in float32
            for name, got in dict(r_star=E.r_star(z_there, t_there), nearest=E.nearest(z_there, 3)).items():
                want = truth.r_star(z.double(), t) if name == "r_star" else truth.nearest(z.double(), 3)
                assert all(a.device.type == kind for a in got) and torch.equal(got[1].cpu(), want[1])
            assert float(E.log_overlap(t_there).log_c[0]) == pytest.approx(float(truth.log_overlap(t).log_c), rel=1e-5)


def test_training(kind, tmp_path, monkeypatch):
    """The same weights as on the CPU, whose noise this device draws; with data that stay on the disk, too, and in bf16
    nearly."""
    data = train.load_data("digits")
    features = np.random.default_rng(0).normal(size=(len(data["x"]), 4, 6)).astype(np.float16)
    train.save_dataset(tmp_path / "toy", {k: np.array(v) for k, v in data.items() if k != "meta"} |
                       dict(features=features), data["meta"])
    cfg = train.Config(data=str(tmp_path / "toy"), model="SiT-nano/4", steps=8, batch=16, accum=2, repa=0.5,
                       log_every=4, repa_depth=1, save_every=4, keep=(4,), dtype="fp32", device=kind)

    def trained(out, **fields):
        run = train.train(dataclasses.replace(cfg, out=str(tmp_path / out), **fields))
        return torch.cat([w.flatten() for w in torch.load(run / "ckpt.pt")["model"].values()])
    cpu = trained("cpu", device="cpu")
    trained("there", steps=4)
    assert (trained("there") - cpu).abs().max() < 1e-5       # resumed; on a CPU, of a global batch, the same noise
    assert (trained("bf16", dtype="bf16", compile=True) - cpu).abs().max() < 0.02
    monkeypatch.setattr(train, "resident", lambda x, device: x)
    assert (trained("streamed") - cpu).abs().max() < 1e-5


def run(script, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            assert not e.code, e.code


def test_train_and_sample(kind, tmp_path):
    train_args = ["--data=digits", "--model=UNet-pico", "--steps=4", "--batch=16", f"--out={tmp_path / 'run'}"]
    run("train.py", *train_args, f"--device={kind}", "--dry-run")        # it measures the device
    run("train.py", *train_args, f"--device={kind}")
    for argv in (["--w=2", "--solver=heun"], [f"--out={tmp_path / 'samples.npz'}"]):
        run("sample.py", f"--run={tmp_path / 'run'}", "--n=4", *argv, f"--device={kind}")
    assert (tmp_path / "samples.npz").exists()


@pytest.mark.parametrize("name", ["exp_shells", "exp_cfg_paradox", "exp_freedom", "exp_scaling", "exp_gaussian",
                                  "exp_toy2d"])
def test_experiments(kind, name, tmp_path):
    argv = dict(TINY_FIGURES, exp_freedom=[*TINY_FREEDOM, "--workers=1", "--at-once=6"], exp_scaling=TINY_SCALING,
                exp_gaussian=["--points", "20", "50", "--seeds=2", "--iterations=20", "--eval-every=10", "--n-eval=40"],
                exp_toy2d=TINY_TOY)[name]
    if name in TINY_FIGURES:
        argv = [*argv, *MODEL, f"--train.out={tmp_path / 'model'}"]
    if name == "exp_toy2d" and kind == "mps":
        pytest.skip("it computes in float64")
    if name == "exp_scaling" and kind == "mps":
        argv = [*argv, "--only=fig3"]                        # the other parts take the same ways, and a minute
    run(f"{name}.py", *(a for a in argv if "device" not in a), f"--device={kind}", f"--out={tmp_path}")
    assert (tmp_path / "results.json").exists()


def test_the_bench_of_a_gpu(monkeypatch, tmp_path):
    import bench
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(es, "SMALL", 0)
    monkeypatch.setattr(es, "low_precision", lambda *_: torch.bfloat16)
    with elsewhere("cuda"):
        bench.on_gpu((500, 3000), 64, 32)
    found = json.loads((tmp_path / "out" / "bench_score_gpu.json").read_text())
    assert len(found["table"]) == 10 and max(r["error"] for r in found["table"]) < 1e-5 and "H100" in found["machine"]


def test_latents(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "load_vae", lambda name: Net())
    monkeypatch.setattr(imagenet, "load_dino", lambda name: Dino())
    write_images(tmp_path)
    for out, more in (("mean", ["--repa"]), ("sample", ["--latent", "sample"])):
        assert prepare.main(["imagenet", "--source", str(tmp_path), "--out", str(tmp_path.parent / (kind + out)),
                             "--device", kind, "--workers", "1", *more]) == 0
