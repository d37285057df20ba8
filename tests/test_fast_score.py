"""Test plumbing/fast_score.py: what it strikes is light, whatever the data, and both engines agree.
The truth is computed by differences in numpy's long double (80 bits on x86), from the very numbers that are given.
"""
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_empirical_score import TIMES, error

import plumbing.fast_score as fast
from empirical_score import EmpiricalScore
from plumbing.fast_score import FastEmpiricalScore

FUZZ = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BFLOAT16 = torch.bfloat16


def random_set(seed, N, D, kind, scale, offset, dtype=torch.float32):
    """Return N points of D dimensions that are hard in one way or another."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(N, D, generator=g, dtype=torch.float64)
    random = torch.rand(N, 1, generator=g, dtype=torch.float64)
    if kind == "alike":                 # two groups, each within the error of bfloat16; the centre is in neither
        base = base[torch.arange(N) % min(2, N)] + 10.0**(-2 - 5 * random) * base
    elif kind == "duplicates":
        base = base[torch.randint(max(1, N // 4), (N,), generator=g)]
    elif kind == "norms":               # over six orders of magnitude
        base = base * 10.0**(6 * random - 3)
    elif kind == "ties":                # many distances are exactly equal
        base = base.sign()
    elif kind == "spikes":              # one dimension carries it all
        base[:, 0] *= 1e4
    return (scale * (base + offset)).to(dtype)


def random_queries(x, t, B, seed, far):
    """Return noisy points, half of them between two points, and stretched by `far`."""
    g = torch.Generator().manual_seed(seed + 1)
    i, j = torch.randint(len(x), (2, B), generator=g)
    between = torch.rand(B, 1, generator=g).round() / 2
    scale = (x - x.mean(0)).abs().amax().clamp(min=1e-30)
    z = (1 - t) * (x[i] + between * (x[j] - x[i])) + t * scale * torch.randn(B, x.shape[1], generator=g)
    return (far * z).to(x.dtype)


def truth(x, z, t):
    """Return |z - (1 - t) x|^2 and the softmax weights, (B, N), and the points, in long double."""
    x, z = (a.double().numpy().astype(np.longdouble) for a in (x, z))
    t = np.longdouble(t)
    d2 = ((z[:, None] - (1 - t) * x)**2).sum(2)
    w = np.exp(-(d2 - d2.min(1, keepdims=True)) / (2 * t * t))
    return d2, w / w.sum(1, keepdims=True), x


cases = st.fixed_dictionaries(dict(
    seed=st.integers(0, 2**31), N=st.integers(1, 150), D=st.sampled_from([1, 2, 17, 64, 300]),
    kind=st.sampled_from(["plain", "alike", "duplicates", "norms", "ties", "spikes"]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]), offset=st.sampled_from([0.0, 3.0, 1e4]),
    t=st.sampled_from([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999]), far=st.sampled_from([1.0, 1.0, 30.0]),
    stored=st.sampled_from([BFLOAT16, torch.float32, torch.float64]),
    chunk=st.sampled_from([7, 64, 1000])))


def build(case):
    """Return the points, 8 queries, and the engine, which screens all questions."""
    x = random_set(*(case[key] for key in ("seed", "N", "D", "kind", "scale", "offset", "stored")))
    return x, random_queries(x.float(), case["t"], 8, case["seed"], case["far"]), screening(x, chunk=case["chunk"])


def screening(x, y=None, **options):
    """Return an engine that screens small questions, too."""
    E = FastEmpiricalScore(x, y, **options)
    E.small = 0
    return E


def kept_points(E, z, t):
    """Return which points of all survive for each query, (B, N)."""
    return E.screen(*E.queries(z, t), torch.arange(E.N)).kept


def lengths_of(E, x, z, t):
    """Return the lengths |q| (B, 1), the largest |x|, and that of the centre."""
    length = (z.double() - (1 - t) * E.centre).norm(dim=1, keepdim=True).numpy()
    return length, float((x.double() - E.centre).norm(dim=1).max()), float(E.centre.norm())


@FUZZ
@given(cases)
def test_bounds_hold_and_nothing_that_matters_is_struck(case):
    t = case["t"]
    x, z, E = build(case)
    d2, _, _ = truth(x, z, t)
    z64, t64 = E.queries(z, t)
    q = z64 - (1 - t) * E.centre32.double()
    length, radius, centre = lengths_of(E, x, z, t)
    # what float64 may lose of a squared distance when the data are centred
    loss = 1e-12 * (length**2 + radius**2) + 1e-15 * centre * (length + radius + 1e-3 * centre)
    found, slip = E.float32_distances(q, 1 - t64, torch.arange(E.N))
    error = np.abs((found.double() + q.square().sum(1, keepdim=True)).numpy() - d2)
    assert (error <= slip.numpy() + loss).all()
    slack = 2 * t**2 * np.log(E.N / fast.TAU)
    far = d2 + loss > d2.min(1, keepdims=True) + slack * (1 - 1e-6)
    assert (kept_points(E, z, t).numpy() | far).all()


@FUZZ
@given(cases, st.sampled_from([1, 8]))
def test_the_weight_left_out_is_at_most_what_is_returned(case, together):
    t = case["t"]
    x, z, E = build(case)
    _, w, points = truth(x, z, t)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "TOGETHER", together)
        x_star, bound = E.posterior_mean_and_bound(z.double(), t)
    assert (bound >= 0).all() and (bound <= fast.TAU).all()
    kept = kept_points(E, z, t).numpy()
    if together == 8:
        spread = kept.sum(1) > E.N / together
        for group in (spread, ~spread):
            kept[group] = kept[group].any(0)
    # float64 misses a logit by about this much: 1e-16 of the coordinates, times a distance, over t^2.
    length, radius, centre = lengths_of(E, x, z, t)
    reach = length.max() + radius
    slop = 1e-14 * (radius + 1e-2 * centre) * reach / t**2
    if slop < 1e-3:
        light = w < (1 + 2e-3) * fast.TAU / E.N * w.max(1, keepdims=True)
        assert ((w * ~kept).sum(1) <= bound.numpy() * (1 + 1e-3) + 1e-300).all() and (kept | light).all()
        error = np.abs(x_star.numpy() - (w @ points).astype(np.float64)).max()
        assert error <= (1e-5 + slop) * (radius + 1e-30) + 1e-10 * centre


def test_the_fuzz_has_teeth(monkeypatch):
    """An estimate without its slip strikes points that matter: the tests above would see it."""
    monkeypatch.setattr(fast, "TAU", 150.0)  # then a survivor must be as near as the nearest
    wrong = dict(slip=0, none=0)
    for seed in range(20):
        case = dict(seed=seed, N=150, D=64, kind="alike", scale=1.0, offset=0.0, t=1e-3, far=1.0,
                    stored=torch.float32, chunk=1000)
        x, z, E = build(case)
        nearest = truth(x, z, 1e-3)[0].argmin(1)
        wrong["slip"] += (~kept_points(E, z, 1e-3)[range(8), nearest]).sum()
        whole = E.float32_distances
        E.float32_distances = lambda *question, whole=whole: (whole(*question)[0], torch.zeros(8, 1))
        wrong["none"] += (~kept_points(E, z, 1e-3)[range(8), nearest]).sum()
    assert wrong["slip"] == 0 and wrong["none"] > 0


# ---- both engines ----------------------------------------------------------------------------------------------------

def decaying(N=1500, D=256, seed=0):
    """Return points (N, D) that vary little in most directions, as images do, in an ordered order, and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g) * torch.arange(1, D + 1)**-0.7
    x = x[x[:, 0].argsort()] + 3
    x[7] = x[3]
    return x, torch.arange(N) % 3


def noisy(x, t):
    return (1 - t) * x[:40] + t * torch.randn(40, x.shape[1], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("t", TIMES)
def test_both_engines_agree_on_every_method(t, labelled):
    x, y = decaying()
    z, label = noisy(x, t), y[:40] if labelled else None
    plain, quick = EmpiricalScore(x, y), screening(x, y, chunk=400)
    for method in ("posterior_mean", "score", "velocity"):
        a, b = getattr(quick, method)(z, t, label), getattr(plain, method)(z, t, label)
        assert a.dtype == b.dtype and a.shape == b.shape and error(a, b) < 1e-5, method
    x_star, bound = quick.posterior_mean_and_bound(z, t, label)
    assert error(x_star, plain.posterior_mean(z, t, label)) < 1e-5 and (bound <= fast.TAU).all()
    assert torch.allclose(quick.mean_and_size(z, t, label)[1], plain.mean_and_size(z, t, label)[1], rtol=1e-4)
    # Rows 3 and 7 are equal, so we compare the points and not their rows.
    for ask in (lambda E: E.r_star(z, t), lambda E: E.nearest(z, 5)):
        (a, i), (b, j) = ask(quick), ask(plain)
        assert torch.allclose(a, b, atol=1e-9) and torch.equal(x[i], x[j])
    plain.chunk = quick.chunk                                # a generator draws chunk by chunk
    draws = [E.sample_posterior(z, t, label, torch.Generator().manual_seed(0)) for E in (quick, plain)]
    assert torch.equal(*draws) and (label is None or torch.equal(y[draws[0]], label))


def test_points_are_struck_where_weights_collapse():
    x = torch.randn(3000, 100, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.01, 0.2, 0.95, 1.0])
    z = (1 - t[:, None]) * x[:4] + t[:, None] * torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    E = screening(x)
    few, some, most, all_points = kept_points(E, z, t).sum(1).tolist()
    assert few == some == 1 and most > 1000 and all_points == 3000
    size = E.mean_and_size(z, t)[1]
    assert size[0] < 1.01 and size[3] == 3000


# ---- hard numbers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [1e19, 1e25, 1e-25, 1e-38])
def test_numbers_that_float32_products_cannot_hold(scale):
    x = scale * torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = 0.9 * x[:4]
    assert torch.equal(screening(x).posterior_mean(z, 0.1), EmpiricalScore(x).posterior_mean(z, 0.1))


@pytest.mark.parametrize("huge", [[3], [3, 20], [*range(39)]])
def test_huge_queries_leave_the_others_of_their_batch_alone(huge):
    x, _ = decaying()
    E, z = screening(x), noisy(x, 0.2)
    alone = E.posterior_mean(z, 0.2)
    z[huge] *= 1e20
    together = E.posterior_mean(z, 0.2)
    others = [b for b in range(40) if b not in huge]
    assert error(together[others], alone[others]) < 1e-6 and together.isfinite().all()


@pytest.mark.parametrize("n, b, k", [(2048, 256, 784), (37, 5, 4096), (1, 1, 1), (3, 0, 16)])
def test_a_product_loses_no_more_than_the_bounds_allow(n, b, k):
    """The sums are all of one sign, so that errors add up."""
    g = torch.Generator().manual_seed(0)
    x, q = torch.rand(n, k, generator=g), torch.rand(b, k, generator=g)
    bound = (k + 20) * 2.0**-23 * x.double().norm(dim=1)[:, None] * q.double().norm(dim=1)
    assert ((x @ q.T - x.double() @ q.double().T).abs() <= bound).all()


def test_the_precision_that_the_caller_has_set_changes_nothing_and_comes_back():
    x = random_set(0, 500, 64, "alike", 1.0, 0.0)
    E, z, alpha = screening(x), random_queries(x, 0.9, 8, 0, 1.0).double(), torch.full((8, 1), 0.1)
    want, before = E.float32_distances(z, alpha, torch.arange(500))[0], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", BFLOAT16):
            assert torch.equal(E.float32_distances(z, alpha, torch.arange(500))[0], want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype, offset", [("uint8", 100), ("float16", 100), ("uint32", 4_000_000_000)])
def test_a_memory_map_of_whole_numbers(tmp_path, dtype, offset):
    numbers = offset + np.random.default_rng(0).integers(0, 100, (600, 128))
    np.save(tmp_path / "x.npy", numbers.astype(dtype))
    E = screening(np.load(tmp_path / "x.npy", mmap_mode="r"))
    x, t = torch.from_numpy(numbers.astype(np.float64)), 1e-3
    assert torch.equal(E.posterior_mean((1 - t) * x[:20], t), x[:20])
    assert (kept_points(E, (1 - t) * x[:20], t).sum(1) == 1).all()
