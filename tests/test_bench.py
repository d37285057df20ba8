"""tests/bench.py: every command runs at a tiny size, and leaves what the docs read. No time is asserted."""
import json

import bench
import pytest

from train import Config


def read(name):
    return json.loads((bench.OUT / f"{name}.json").read_text())


def test_figures_tests_and_training(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OUT", tmp_path)
    script = "mkdir -p out/exp_a; echo == exp_a.py; sleep 1.2; echo == train.py; echo 1 > out/exp_a/results.json"
    bench.figures(["bash", "-c", script])
    bench.tests(["true"])
    bench.training(Config(data="digits", model="SiT-pico/4"), steps=12, rounds=1)
    found = read("bench")
    assert found["figures"]["exp_a"] >= 1 and [*found["figures"]] == ["exp_a", "train"]
    assert found["installation"] < 60 and found["tests"] < 60 and found["machine"] == bench.machine()
    assert found["train"]["images_per_second"] > 0 and found["train"]["plain"] > 0 and (tmp_path / "exp_a/results.json").exists()
    with pytest.raises(SystemExit, match="error: make figures failed"):
        bench.figures(["false"])


def test_the_score_beside_its_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OUT", tmp_path)
    bench.score(N=300, B=10, rounds=1)
    bench.growth(64, (100, 1000), B=5)
    found = read("bench_score")
    error = {(row["method"], row["t"]): row["error"] for row in found["peers"]}
    assert found["shape"] == [300, 784, 10] and len(error) == len(found["peers"]) >= 14
    for t in (0.3, 0.95):
        assert error["this project", t] < 2e-6 and error["empirical_score.py, plain float64", t] < 2e-6
        assert error["one bare fp32 product", t] is None and error["torch.cdist + softmax", t] < 1e-2
    assert len(found["growth"]) == 4 and max(row["error"] for row in found["growth"]) < 2e-6
    assert (tmp_path / "bench_score.png").exists()
