"""The trainer: the loss, the same update on any number of processes, exact resume, what the experiments rely on."""
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from sample import load_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set in the project's layout: 50 images of 8 x 8 in 4 classes."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    rng = np.random.default_rng(0)
    y = np.arange(50) % 4
    x = np.clip(0.3 * rng.standard_normal((50, 1, 8, 8)) + (y / 2 - 0.75)[:, None, None, None], -1, 1)
    arrays = dict(x=x.astype(np.float32), y=y, x_heldout=x[:9].astype(np.float32), y_heldout=y[:9])
    train.save_dataset(folder, arrays, dict(name="toy", num_classes=4))
    return str(folder)


def config(folder, out, **changes):
    return train.Config(**dict(data=folder, model="SiT-nano/4", steps=6, batch=12, log_every=2, save_every=3,
                               device="cpu", warmup=0, out=str(out)) | changes)


def weights(run, key="ema"):
    state = torch.load(Path(run) / "ckpt.pt", weights_only=True)[key]
    return torch.cat([v.flatten().double() for v in state.values()])


def torchrun(n, cfg):
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(cfg).items()
            if not isinstance(v, (bool, tuple))]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone",
                           ROOT / "train.py", *argv], capture_output=True, text=True, timeout=100)


def test_loss_of_a_perfect_and_of_a_zero_model():
    x, eps, t = torch.randn(400, 1, 8, 8), torch.randn(400, 1, 8, 8), torch.rand(400)
    x[:] = x[0]                                              # one data point: v = (z - x)/t is known
    perfect = lambda z, t, y: (z - x) / t[:, None, None, None]
    assert train.dsm_loss(perfect, x, None, t, eps, "v") < 1e-4
    assert train.dsm_loss(lambda z, t, y: x, x, None, t, eps, "x") == 0
    zero = lambda z, t, y: torch.zeros_like(z)
    assert torch.isclose(train.dsm_loss(zero, x, None, t, eps, "v"), (eps - x).square().mean())


def test_each_epoch_sees_every_image_once():
    seen = np.concatenate([train.step_indices(k, 7, 50, seed=0) for k in range(100)])       # 14 epochs of 50
    for epoch in seen.reshape(14, 50):
        assert sorted(epoch) == list(range(50))
    assert (seen[:50] != seen[50:100]).any()
    assert len(train.step_indices(0, 120, 50, seed=0)) == 120                               # a batch of several epochs


def test_noise_of_a_step_is_a_function_of_seed_and_step():
    a, b = (train.step_noise(5, (8, 1, 2, 2), seed=1, device=torch.device("cpu")) for _ in range(2))
    other = train.step_noise(6, (8, 1, 2, 2), seed=1, device=torch.device("cpu"))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and not torch.equal(a[1], other[1])
    t, eps, u = train.step_noise(0, (20_000, 1, 1, 1), seed=0, device=torch.device("cpu"))
    assert abs(t.mean() - 0.5) < 0.01 and abs(eps.std() - 1) < 0.02 and abs((u < 0.1).float().mean() - 0.1) < 0.01


def test_training_lowers_the_loss_and_writes_what_it_says(data, tmp_path):
    run = train.train(config(data, tmp_path / "a", steps=150, lr=3e-3, log_every=30, save_every=150))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [30, 60, 90, 120, 150] and log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert log[-1]["heldout_loss"] > 0 and log[-1]["images_per_second"] > 0 and (run / "samples.png").exists()
    assert not list(run.glob("*.tmp*"))


def test_resume_continues_exactly(data, tmp_path):
    whole = train.train(config(data, tmp_path / "whole"))
    part = train.train(config(data, tmp_path / "part", steps=3))
    train.train(config(data, tmp_path / "part"))
    for key in ("model", "ema"):
        assert torch.equal(weights(whole, key), weights(part, key))
    a, b = ([{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "grad_norm")}
             for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, part))
    assert a[-1] == b[-1]
    before = (part / "ckpt.pt").stat().st_mtime_ns
    train.train(config(data, tmp_path / "part"))             # nothing left to do
    assert (part / "ckpt.pt").stat().st_mtime_ns == before


def test_the_average_keeps_no_history(data, tmp_path, monkeypatch):
    """An average that autograd follows would hold the graph of every step before it, and memory would grow."""
    copies, deepcopy = [], train.copy.deepcopy
    monkeypatch.setattr(train.copy, "deepcopy", lambda m: copies.append(deepcopy(m)) or copies[-1])
    train.train(config(data, tmp_path / "a"))
    assert all(p.grad_fn is None and not p.requires_grad for p in copies[0].parameters())


def test_the_average_follows_its_formula(data, tmp_path):
    """After one step the decay is min(ema, 1/10): the average is 9 parts new weights, 1 part old."""
    cfg = config(data, tmp_path / "a", steps=1)
    run = train.train(cfg)
    torch.manual_seed(cfg.seed)
    fresh = train.build_model("SiT-nano/4", 8, 1, 4).state_dict()
    start = torch.cat([v.flatten().double() for v in fresh.values()])
    want = 0.1 * start + 0.9 * weights(run, "model")
    assert (weights(run, "ema") - want).abs().max() < 1e-6 and (start - want).abs().max() > 1e-4


def test_accumulation_gives_the_same_update(data, tmp_path):
    a = train.train(config(data, tmp_path / "a"))
    b = train.train(config(data, tmp_path / "b", accum=3))
    assert (weights(a, "model") - weights(b, "model")).abs().max() < 1e-5


def test_two_ranks_give_the_update_of_one(data, tmp_path):
    one = train.train(config(data, tmp_path / "one", steps=4))
    done = torchrun(2, config(data, tmp_path / "two", steps=4, accum=2))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (weights(one, "model") - weights(tmp_path / "two", "model")).abs().max() < 1e-5
    assert (weights(one) - weights(tmp_path / "two")).abs().max() < 1e-5
    assert "2 processes" in done.stdout and done.stdout.count("training:") == 1
    log = [[json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
           for run in (one, tmp_path / "two")]
    assert np.allclose(*log, rtol=1e-4)                      # the logged loss is that of the global batch


def test_several_processes_refuse_in_one_line(data, tmp_path):
    done = torchrun(2, config(data, tmp_path / "run", steps=-4))
    assert done.returncode == 1 and done.stderr.count("error: steps must be at least 1, not -4") == 1, done.stderr


def with_features(folder, out, dim=5):
    """The toy data with a teacher's features of its 4 tokens beside them."""
    data = train.load_data(folder)
    features = np.random.default_rng(2).standard_normal((50, 4, dim)).astype(np.float16)
    arrays = {k: np.array(v) for k, v in data.items() if k != "meta"} | dict(features=features)
    train.save_dataset(out, arrays, data["meta"])
    return str(out)


def test_repa_against_its_formula(data, tmp_path):
    """One step of plain gradient descent in place of AdamW, by hand."""
    torch.manual_seed(0)
    model = train.build_model("SiT-nano/4", 8, 1, 4)
    for p in model.parameters():                             # not the zeros that a fresh SiT has in its last layers
        p.requires_grad and torch.nn.init.normal_(p, std=0.1)
    repa, f = train.Repa(model, 1, 5), torch.randn(3, 4, 5)
    z, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 4])
    assert torch.equal(repa(z, t, y), model(z, t, y))
    tokens = model.blocks[0](model.x_embedder(z) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y))
    out = repa.projector(tokens).detach().double().numpy()
    cos = (out * f.numpy()).sum(2) / np.linalg.norm(out, axis=2) / np.linalg.norm(f.numpy(), axis=2)
    assert abs(repa.loss(f).item() + cos.mean()) < 1e-6
    repa.loss(f).backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0 and model.blocks[1].mlp.fc1.weight.grad is None


def test_repa_trains_resumes_and_divides_over_processes(data, tmp_path):
    folder = with_features(data, tmp_path / "toy")
    plain = train.train(config(folder, tmp_path / "plain"))
    one = train.train(config(folder, tmp_path / "one", repa=0.5, repa_depth=1))
    assert not torch.equal(weights(plain), weights(one))
    train.train(config(folder, tmp_path / "part", repa=0.5, repa_depth=1, steps=3))
    part = train.train(config(folder, tmp_path / "part", repa=0.5, repa_depth=1))
    done = torchrun(2, config(folder, tmp_path / "two", repa=0.5, repa_depth=1, accum=2))
    assert done.returncode == 0, done.stderr[-2000:]
    for key in ("model", "ema", "projector"):
        assert torch.equal(weights(one, key), weights(part, key))
        assert (weights(one, key) - weights(tmp_path / "two", key)).abs().max() < 1e-5
    for changes, message in ((dict(repa_depth=3), "none of the blocks"), (dict(model="UNet-nano-conv"), "needs a SiT"),
                             (dict(data=data), "features.npy"), (dict(model="SiT-nano/2"), r"\(50, 16, dim\)")):
        with pytest.raises(ValueError, match=message):
            train.train(config(**dict(folder=folder, out=tmp_path / "bad", repa=1.0, repa_depth=1) | changes)
                        if "data" not in changes else config(data, tmp_path / "bad", repa=1.0, repa_depth=1))


def test_data_that_stay_on_the_disk_give_the_same(data, tmp_path, monkeypatch):
    here = train.train(config(data, tmp_path / "here"))
    monkeypatch.setattr(train, "resident", lambda x, device: x)
    there = train.train(config(data, tmp_path / "there"))
    assert torch.equal(weights(here, "model"), weights(there, "model"))


def test_weights_to_start_from_and_weights_that_are_kept(data, tmp_path):
    one = train.train(config(data, tmp_path / "one", keep=(2, 4)))
    two = train.train(config(data, tmp_path / "two", init=str(one), lr=1e-30, steps=1))
    assert (weights(two) - weights(one)).abs().max() < 1e-6
    short = train.train(config(data, tmp_path / "short", steps=2))
    kept = torch.cat([v.flatten().double() for v in load_run(one / "ema_2.pt")[0].state_dict().values()])
    assert torch.equal(kept, weights(short)) and (one / "ema_4.pt").exists() and not (one / "ema_6.pt").exists()
    with pytest.raises(ValueError, match="does not fit SiT-micro/4"):
        train.train(config(data, tmp_path / "bad", init=str(one), model="SiT-micro/4"))


def test_a_dry_run_writes_nothing_and_says_what_is_missing(data, tmp_path, capsys, monkeypatch):
    cfg = config(data, tmp_path / "a", dry_run=True)
    train.train(cfg)
    said = capsys.readouterr().out
    assert "train 1 x SiT-nano/4, 0.05M parameters: 6 steps of 12" in said and not (tmp_path / "a").exists()
    args = tuple(dict(name="SiT-nano/4", input_size=8, in_channels=1, num_classes=4).items())
    forward, step, kept = train.rates(args, torch.device("cpu"))
    assert 0 < forward < step < 1 and 4 * 4 * 32 * 10 < kept < 4 * 4 * 32 * 200       # 4 tokens of width 32, two blocks
    run = train.train(config(data, tmp_path / "a", steps=4))
    train.train(cfg)
    assert ": 2 steps of 12" in capsys.readouterr().out      # what is still to do
    before = (run / "ckpt.pt").stat().st_mtime_ns
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match="GB are needed on the disk"):
        train.train(cfg)
    monkeypatch.setattr(train, "rates", lambda *a: (1.0, 1.0, 1e15))
    with pytest.raises(ValueError, match="GB of memory are needed"):
        train.train(cfg)
    assert (run / "ckpt.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="features.npy"):
        train.train(config(data, tmp_path / "b", dry_run=True, repa=1.0, repa_depth=1))


def test_label_dropout_trains_the_null_label(data, tmp_path):
    for p, moves in ((0.0, False), (1.0, True)):
        cfg = config(data, tmp_path / str(p), label_dropout=p)
        model, _ = load_run(train.train(cfg), ema=False)
        torch.manual_seed(cfg.seed)
        fresh = train.build_model("SiT-nano/4", 8, 1, 4).y_embedder.embedding_table.weight
        table = model.y_embedder.embedding_table.weight
        assert torch.equal(table[-1], fresh[-1]) != moves and torch.equal(table[:-1], fresh[:-1]) == moves


def test_x_prediction_and_unet_and_bf16(data, tmp_path):
    for k, changes in enumerate([dict(prediction="x"), dict(model="UNet-nano-conv"), dict(dtype="bf16")]):
        run = train.train(config(data, tmp_path / str(k), steps=2, **changes))
        assert load_run(run)[0].prediction == changes.get("prediction", "v")


def test_folders_of_runs():
    assert train.run_folder(train.Config()).name == "laptop_mnist5k_SiT-tiny-4"
    assert train.run_folder(train.Config(lr=0.1, device="cpu")).name == "laptop_mnist5k_SiT-tiny-4_lr=0.1"
    assert train.run_folder(train.PRESETS["paper"]).name == "paper_imagenet_SiT-XL-2"


@pytest.mark.parametrize("changes, message", [
    (dict(data="nowhere"), "no data set at"),
    (dict(batch=10, accum=3), "does not divide"),
    (dict(steps=0), "steps must be at least 1"),
    (dict(model="SiT-huge/4"), "unknown model 'SiT-huge/4'"),
    (dict(model="SiT-nano/3"), "patch size 3"),
    (dict(device="cuda:9" if not torch.cuda.is_available() else "tpu"), "not available"),
])
def test_bad_configs(data, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        train.train(config(data, tmp_path / "bad", **changes))
    assert not (tmp_path / "bad").exists()


def test_another_config_does_not_resume(data, tmp_path):
    train.train(config(data, tmp_path / "a", steps=2))
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    for changes, message in ((dict(lr=0.5), "with lr = 0.003, not 0.5"), (dict(steps=1), "past the 1 asked for")):
        with pytest.raises(ValueError, match=message):
            train.train(config(data, tmp_path / "a", **changes))
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before


def test_diverged_training_keeps_the_last_checkpoint(data, tmp_path):
    run = train.train(config(data, tmp_path / "a", steps=4, lr=1e30, warmup=10**32))       # harmless so far
    before = (run / "ckpt.pt").read_bytes()
    ckpt = torch.load(run / "ckpt.pt", weights_only=True)
    torch.save(ckpt | {"config": ckpt["config"] | {"warmup": 0}}, run / "ckpt.pt")
    kept = weights(run)
    with pytest.raises(ValueError, match="the loss is .* at step"):
        train.train(config(data, run, steps=60, lr=1e30, log_every=30, save_every=2))
    assert torch.equal(weights(run), kept) or weights(run).isfinite().all()
    assert len(before) > 0 and not list(run.glob("*.tmp"))


def test_a_torn_log_does_not_stop_a_run(data, tmp_path):
    run = train.train(config(data, tmp_path / "a", steps=4))
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    train.train(config(data, run))
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [2, 4, 6]


def test_a_data_set_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    y, folder, rename = np.arange(5), tmp_path / "d", train.os.replace
    train.save_dataset(folder, dict(y=y), {})
    def fails_at_the_end(a, b):
        if str(a).endswith(".new"):
            raise OSError("no space left")
        rename(a, b)
    monkeypatch.setattr(train.os, "replace", fails_at_the_end)
    with pytest.raises(OSError, match="no space left"):
        train.save_dataset(folder, dict(y=y + 1), {})
    assert np.array_equal(np.load(folder / "y.npy"), y) and [p.name for p in tmp_path.iterdir()] == ["d"]
    monkeypatch.setattr(train.os, "replace", rename)
    train.save_dataset(folder, dict(y=y + 1), {})
    assert np.array_equal(np.load(folder / "y.npy"), y + 1) and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_data_sets_are_checked(tmp_path):
    x, y = np.zeros((5, 1, 8, 8), np.float32), np.arange(5)
    cases = [(dict(x=x, y=y[:4]), "y.npy must be 5 integer labels"), (dict(x=x, y=y + 1), "labels in 0 .. 4"),
             (dict(x=x[:, 0], y=y), "shape (N, C, H, H)"), (dict(x=x.astype(int), y=y), "must be floating point"),
             (dict(y=y), "'x' is missing"), (dict(x=x[:0], y=y[:0]), "shape (N, C, H, H)"),
             (dict(x=x, y=y, x_heldout=x), "'y_heldout' is missing"),
             (dict(x=x, y=y, x_heldout=x[:, :, :4, :4], y_heldout=y), "x_heldout.npy must be")]
    for k, (arrays, message) in enumerate(cases):
        train.save_dataset(tmp_path / str(k), arrays, dict(num_classes=5))
        with pytest.raises(ValueError) as e:
            train.load_data(str(tmp_path / str(k)))
        assert message in str(e.value)
    train.save_dataset(tmp_path / "p", dict(x=x, y=y), dict(num_classes=5))
    np.save(tmp_path / "p" / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="(?i)pickle|object"):
        train.load_data(str(tmp_path / "p"))


def test_embedded_sets(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DATA", tmp_path)
    for name, n, held, side in (("mnist5k", 4500, 500, 28), ("digits", 1617, 180, 8)):
        d = train.load_data(name)
        assert d["x"].shape == (n, 1, side, side) and d["x_heldout"].shape[0] == held and isinstance(d["x"], np.memmap)
        assert d["x"].min() == -1 and d["x"].max() == 1 and d["x"].dtype == np.float32
        counts = np.bincount(d["y_heldout"])
        assert len(counts) == 10 and counts.max() - counts.min() <= 2
        flat = {a.tobytes() for a in np.asarray(d["x"])}
        assert sum(a.tobytes() in flat for a in np.asarray(d["x_heldout"])) <= 1       # held out means held out


def test_verdicts_follow_from_the_interval():
    verdict = lambda ci, **bound: train.claim("c", "p", 0.0, ci, **bound)["verdict"]
    assert verdict((1.1, 1.5), low=1.0) == "holds" and verdict((0.9, 1.5), low=1.0) == "not resolved"
    assert verdict((0.1, 0.9), low=1.0) == "contradicted" and verdict((0.1, 0.9), high=1.0) == "holds"
    assert verdict((1.1, 1.2), high=1.0) == "contradicted"


def test_interval_of_a_difference():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(300) + 1, rng.standard_normal(200)
    low, high = train.bootstrap(a, minus=b)
    assert low < 1 < high and 0.2 < high - low < 0.8         # two medians: 1.96 * 2 * 1.25 * sqrt(1/300 + 1/200) = .45


def test_intervals():
    rng = np.random.default_rng(0)
    hit = 0
    for k in range(200):                                     # a 95% interval holds the truth 95 times in 100
        low, high = train.bootstrap(rng.standard_normal(80), seed=k, n=200)
        hit += low <= 0 <= high
    assert 178 <= hit <= 199
    low, high = train.wilson(np.array([0, 50, 100]), 100)
    assert np.allclose([low[0], high[0]], [0, 0.0370], atol=1e-3)
    assert np.allclose([low[1], high[1]], [0.4038, 0.5962], atol=1e-3)
    assert np.allclose(low + high[::-1], 1)


def test_command_line(tmp_path):
    run = lambda *a: subprocess.run([sys.executable, ROOT / "train.py", *a], capture_output=True, text=True)
    assert "training iterations" in run("--help").stdout and run("--help").returncode == 0
    for argv, message in ((["--preset", "huge"], "unknown preset 'huge'"), (["--data", "nowhere"], "no data set at")):
        done = run(*argv)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert run("--stepz", "3").returncode == 1


def test_one_run_has_one_writer(data, tmp_path, monkeypatch):
    """A killed torchrun can leave its workers: the same command then waits a little for them, and gives up."""
    cfg, lock = config(data, tmp_path / "a"), train.lock
    monkeypatch.setattr(train, "lock", lambda folder, patience: lock(folder, patience / 50))
    (tmp_path / "a").mkdir()
    held = lock(tmp_path / "a")
    with pytest.raises(ValueError, match="another process is at work here"):
        train.train(cfg)
    held.close()
    with pytest.raises(ValueError, match="the loss is") as kept:         # an error that is kept keeps nothing locked
        train.train(dataclasses.replace(cfg, lr=1e30))
    shutil.rmtree(tmp_path / "a")
    train.train(cfg)
    held = lock(tmp_path / "a")
    train.train(cfg)                                         # it is trained already: nothing to write
    held.close()
    assert kept


def test_a_finished_run_can_be_read_only(data, tmp_path, monkeypatch):
    run = train.train(config(data, tmp_path / "a"))

    def refuse(folder): raise OSError("read-only")
    monkeypatch.setattr(train, "check_folder", refuse)
    assert train.train(config(data, run)) == run
    with pytest.raises(OSError, match="read-only"):
        train.train(config(data, run, steps=8))


@pytest.mark.parametrize("changes, message", [
    (dict(batch=12, accum=5), "does not divide"), (dict(lr=0.5), "with lr = 0.003, not 0.5"),
    (dict(steps=1), "past the 1 asked for"), (dict(model="SiT-micro/4"), "trained with model"),
    (dict(model="SiT-micro/4", init="RUN", out="NEW"), "does not fit SiT-micro/4"), (dict(keep=(0,)), "keep must be")])
def test_a_dry_run_refuses_what_the_run_would(data, tmp_path, changes, message):
    run = train.train(config(data, tmp_path / "a", steps=2))
    places = dict(RUN=str(run), NEW=str(tmp_path / "new"))
    changes = {k: places.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            train.train(config(data, **dict(out=run, dry_run=dry_run) | changes))


def test_a_dry_run_reads_the_checksums(data, tmp_path):
    arrays = {k: np.array(v) for k, v in train.load_data(data).items() if k != "meta"}
    train.save_dataset(tmp_path / "d", arrays, dict(num_classes=4))
    sums = {f"{k}.npy": hashlib.sha256((tmp_path / "d" / f"{k}.npy").read_bytes()).hexdigest() for k in arrays}
    (tmp_path / "d" / "meta.json").write_text(json.dumps(dict(num_classes=4, sha256=sums)))
    cfg = config(str(tmp_path / "d"), tmp_path / "run", dry_run=True)
    train.train(cfg)
    with open(tmp_path / "d" / "x.npy", "r+b") as f:         # the second half of a copy into a file of the right size
        f.seek(-4000, 2)
        f.write(bytes(4000))
    with pytest.raises(ValueError, match="x.npy has changed since it was made"):
        train.train(cfg)


def test_what_a_step_keeps():
    """Of a layer, its input; of a nonlinearity, its input; no weights, and no copies of them in bf16."""
    net, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3)), torch.randn(16, 8)

    def step(n, bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(x[:n].clone())
        out.float().sum().backward()
    for n in (5, 16):                                        # (16, 16), (16, 8): as large as weights are
        assert train.activations(lambda b: step(b, False), n) == 4 * (8 + 16 + 16)
        assert train.activations(lambda b: step(b, True), n) == 2 * (8 + 16 + 16)
