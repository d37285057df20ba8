"""The certificate of empirical_score.py: what the first pass strikes is light, whatever the data; by brute force.

The truth is computed in numpy's long double (80 bits on x86), by direct differences of the very numbers given."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from elsewhere import tensor_core
from hypothesis import HealthCheck, given, settings

import empirical_score as es
from empirical_score import EmpiricalScore

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def random_set(seed, N, D, kind, scale, offset, dtype=torch.float32):
    """N points of D dimensions that are hard in one way or another."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    base = randn(N, D)
    if kind == "alike":                  # two groups (so that the centre is in neither), each within the bf16 error
        base = randn(2, D)[torch.arange(N) % 2] + 10.0**(-2 - 5 * torch.rand(N, 1, generator=g).double()) * base
    elif kind == "duplicates":
        base = base[torch.randint(max(1, N // 4), (N,), generator=g)]
    elif kind == "norms":                                    # over six orders of magnitude
        base = base * 10.0**(6 * torch.rand(N, 1, generator=g).double() - 3)
    elif kind == "ties":                                     # few values: many distances are exactly equal
        base = base.sign()
    elif kind == "spikes":                                   # one dimension carries it all
        base[:, 0] *= 1e4
    return (scale * (base + offset)).to(dtype)


def random_queries(x, t, B, seed, far):
    """Noisy points, points between two, and points far from all."""
    g = torch.Generator().manual_seed(seed + 1)
    i, j = torch.randint(len(x), (2, B), generator=g)
    mix = torch.rand(B, 1, generator=g).round()              # half of them on a point, half between two
    scale = (x - x.mean(0)).abs().amax().clamp(min=1e-30)
    z = (1 - t) * (x[i] + mix / 2 * (x[j] - x[i])) + t * scale * torch.randn(B, x.shape[1], generator=g)
    return (far * z).to(x.dtype)


def truth(x, z, t):
    """|z - alpha x|^2 (B, N) and the softmax over the points, in long double."""
    x, z = x.double().numpy().astype(np.longdouble), z.double().numpy().astype(np.longdouble)
    t = np.longdouble(t)
    d2 = ((z[:, None] - (1 - t) * x)**2).sum(2)
    w = np.exp(-(d2 - d2.min(1, keepdims=True)) / (2 * t * t)) if t else d2
    return d2, w / w.sum(1, keepdims=True), x


cases = st.fixed_dictionaries(dict(
    seed=st.integers(0, 2**31), N=st.integers(1, 150), D=st.sampled_from([1, 2, 17, 64, 300]),
    kind=st.sampled_from(["plain", "alike", "duplicates", "norms", "ties", "spikes"]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]), offset=st.sampled_from([0.0, 3.0, 1e4]),
    t=st.sampled_from([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999]), far=st.sampled_from([1.0, 1.0, 30.0]),
    low=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]), gpu=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    chunk=st.sampled_from([7, 64, 1000]), directions=st.sampled_from([0, 1, 5, 40]), amd=st.booleans()))


@pytest.fixture(autouse=True)
def screened(monkeypatch):
    monkeypatch.setattr(es, "SMALL", 0)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None: tensor_core(a, b) if out_dtype else mm(a, b))
    for name in ("amd", "wide"): monkeypatch.setattr(es, name, getattr(es, name))            # which build changes


def build(c):
    es.amd = lambda: c["amd"]                                # fp32 products by oneDNN, or by MKL
    es.wide = lambda _: c["gpu"] or c["low"] == torch.float16        # 16-bit products as tensor cores make them
    x = random_set(c["seed"], c["N"], c["D"], c["kind"], c["scale"], c["offset"], c["stored"])
    before, es.low_precision = es.low_precision, lambda *_: c["low"]
    try:
        E = EmpiricalScore(x, chunk=c["chunk"])
    finally:
        es.low_precision = before
    if c["directions"]:                                      # these few first, as in sets of many points
        E._levels = [E._principal(min(c["directions"], E.D)), *E._levels]
    z = random_queries(x.float(), c["t"], 8, c["seed"], c["far"])
    return x, z, E


AS_THEY_ARE = lambda lower, upper, part: (lower, upper)


def screen(E, z, t, level, k=1, slack=0.0, measure=None):
    """The first pass alone -> which points survived (B, N), and which queries it answers (B,)."""
    z64, t64, _ = E._queries(z, t)
    q = z64 - (1 - t64)[:, None] * E.centre
    limit, slack = (torch.full((len(z),), a, device=E.device) for a in (E.N, slack))
    with torch.no_grad():
        b, i, _, done = E._screen(q, 1 - t64, None, level, limit, k, slack, measure)
    kept = torch.zeros(len(z), E.N, dtype=torch.bool)
    kept[b.cpu(), i.cpu()] = True
    return kept.numpy(), done.cpu().numpy()


def rounding(E, z, t):
    """What float64 loses of a squared distance when the data are centred (B, 1)."""
    loss = 1e-12 * ((z.double() - (1 - t) * E.centre).square().sum(1) + E.radius**2).numpy()[:, None]
    return loss + 1e-15 * float(E.centre.norm() * (E.radius + E.centre.norm() * 1e-3))


@FUZZ
@given(cases, st.integers(1, 5))
def test_nothing_that_matters_is_struck(c, k):
    x, z, E = build(c)
    d2, w, _ = truth(x, z, c["t"])
    slack = 2 * c["t"]**2 * 20.0
    for level in E._levels:
        for n, measure in ((1, None), (min(k, len(x)), AS_THEY_ARE)):
            kept, done = screen(E, z, c["t"], level, n, slack, measure)
            best = np.sort(d2, 1)[:, n - 1:n]
            assert done.all() and (kept | (d2 + rounding(E, z, c["t"]) > best + slack * (1 - 1e-6))).all()


@FUZZ
@given(cases)
def test_every_distance_lies_between_its_bounds(c):
    x, z, E = build(c)
    d2, _, _ = truth(x, z, c["t"])
    for level in E._levels:
        seen = []
        screen(E, z, c["t"], level, 1, 0.0, lambda *bounds, seen=seen: seen.append(bounds[:2]) or bounds[:2])
        lower, upper = (torch.cat(b, 1).numpy() for b in zip(*seen[::2], strict=True))   # every other: of exact ones
        loss = rounding(E, z, c["t"])
        assert (lower - loss <= d2).all() and (d2 <= upper + loss).all()


@FUZZ
@given(cases)
def test_the_weight_left_out_is_at_most_what_is_reported(c):
    x, z, E = build(c)
    t = c["t"]
    d2, w, xl = truth(x, z, t)
    got = E.posterior_mean(z, t)
    dropped = E.dropped.numpy()
    assert (dropped <= E.tau).all() and (dropped >= 0).all()
    z64, t64, ((_, members, label),) = E._queries(z, t)
    kept = np.zeros((len(z), len(x)), dtype=bool)
    for b, index, _, e, *_ in E._exponents(z64, t64, members, label, es.LOSS):
        index = index.expand(len(b), -1)
        kept[b[:, None].expand_as(index)[e > -torch.inf], index[e > -torch.inf]] = True
    # a stored offset of 1e4 leaves float64 exponents this much off: 1e-16 of the coordinates, over sigma^2
    slop = 1e-14 * float((E.radius + E.centre.norm() * 1e-2) * (z64.norm(dim=1).max() + E.radius)) / t**2
    if slop < 1e-3:
        assert ((w * ~kept).sum(1) <= dropped * (1 + 1e-3) + 1e-300).all()
        spread = float(E.radius) + float(E.centre.abs().max()) * 1e-6 + 1e-30
        error = np.abs(got.double().numpy() - (w @ xl).astype(np.float64)).max()
        assert error <= (1e-5 + slop) * spread + 1e-6 * float(E.centre.abs().max())


@FUZZ
@given(cases, st.integers(1, 5))
def test_nearest_and_r_star_miss_nothing(c, k):
    x, z, E = build(c)
    k, t = min(k, len(x)), c["t"]
    z = z.double()                                           # float64 in, float64 out: no rounding hides errors
    d2, _, xl = truth(x, z, 0.0)
    want = np.sort(d2, 1)[:, :k].astype(np.float64)
    got, i = E.nearest(z, k)
    loss = 1e-13 * (want + float(E.centre.abs().max())**2 * 1e-6 + float(E.radius)**2 * 1e-6)
    assert (np.abs(got.numpy() - want) <= loss + 1e-12 * want).all()
    d2, _, _ = truth(x, z, t)
    r = np.sqrt(d2) / (np.longdouble(t) * E.D**0.5)
    got, i = E.r_star(z, t)
    least = np.abs(r - 1).min(1)
    at = r[np.arange(len(z)), i.numpy()]
    assert (np.abs(at - 1) <= least + 1e-9 * (1 + r.max(1))).all()


@pytest.mark.parametrize("directions", [0, 30])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32])
def test_the_fuzz_has_teeth(low, directions, monkeypatch):
    """With the middle of the bounds for both, the first pass strikes points that matter: the tests above would see."""
    monkeypatch.setattr(es, "low_precision", lambda *_: low)
    middle = lambda lower, upper, part: [(lower.double() + upper) / 2] * 2
    wrong = 0
    for seed in range(20):
        x = random_set(seed, 150, 64, "alike", 1.0, 0.0)
        z, E = random_queries(x, 0.001, 8, seed, 1.0), EmpiricalScore(x)
        level = E._principal(directions) if directions else E._levels[0]
        kept, _ = screen(E, z, 0.001, level, measure=middle)
        wrong += (~kept[range(8), truth(x, z, 0.001)[0].argmin(1)]).sum()
    assert wrong > 0


def test_values_that_overflow_a_fast_product_are_answered_all_the_same():
    for scale in (1e19, 1e25, 1e-25, 1e-38):
        x = scale * torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        E, z = EmpiricalScore(x), 0.9 * x[:4]
        assert (E.posterior_mean(z, 0.1) - x[:4]).abs().max() <= 1e-12 * scale or scale < 1
        d2, i = E.nearest(x[:4], 1)
        assert i[:, 0].tolist() == [0, 1, 2, 3] and (d2 == 0).all()


def test_the_precision_that_the_caller_has_set_changes_nothing(monkeypatch):
    monkeypatch.setattr(es, "amd", lambda: True)             # by oneDNN, which would take bf16 where there is AMX
    x = random_set(0, 500, 64, "alike", 1.0, 0.0)
    z, E = random_queries(x, 0.9, 8, 0, 1.0), EmpiricalScore(x)
    want, before = E.posterior_mean(z, 0.9), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(E.posterior_mean(z, 0.9), want)
        assert torch.get_float32_matmul_precision() == "medium"          # and it is put back
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 and later")
def test_the_precision_set_in_the_newer_way_is_put_back(monkeypatch):
    """Then torch refuses to tell it in the older way."""
    seen, product = [], es.product
    monkeypatch.setattr(es, "product", lambda a, b: seen.append([b.fp32_precision for b in backends]) or product(a, b))
    x = random_set(0, 500, 64, "alike", 1.0, 0.0)
    backends = [b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn)]
    before = [b.fp32_precision for b in backends]
    try:
        for b in backends: b.fp32_precision = "tf32"
        EmpiricalScore(x).posterior_mean(x[:4], 0.9)
        assert [b.fp32_precision for b in backends] == ["tf32", "tf32"]
        assert seen and all(p == ["ieee", "ieee"] for p in seen)
    finally:
        for b, p in zip(backends, before, strict=True): b.fp32_precision = p


def test_queries_get_the_path_that_their_weights_ask_for():
    """One batch with every t: survivors at small t, fp32 where it is good enough, float64 for float64 queries."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 100, generator=g)
    t = torch.tensor([0.01, 0.2, 0.95, 1.0])
    z = (1 - t[:, None]) * x[:4] + t[:, None] * torch.randn(4, 100, generator=g)
    E = EmpiricalScore(x)
    for query, dense in ((z, torch.float32), (z.double(), torch.float64)):
        z64, t64, _ = E._queries(query, t)
        path = {}
        for b, _, rows, e, *_ in E._exponents(z64, t64, None, None, es.LOSS if query is z else 0.0):
            path |= dict.fromkeys(b.tolist(), "survivors" if rows is None else e.dtype)
        assert path == {0: "survivors", 1: "survivors", 2: dense, 3: dense}
    size = E.effective_size(z, t)
    assert size[0] < 1.01 and size[3] == 3000
    mean, both = E.mean_and_size(z, t)
    assert torch.equal(mean, E.posterior_mean(z, t)) and torch.equal(both, size)


# ---- where float64 itself must be used with care ---------------------------------------------------------------------

def close(got, w, xl):                                       # to x_*, in parts of its length, the largest
    xs = w @ xl
    return float((np.sqrt(((got.double().numpy() - xs)**2).sum(1)) / np.sqrt((xs**2).sum(1))).max())


@pytest.mark.parametrize("small", [0, 2**24])
@pytest.mark.parametrize("far, t", [(1e6, 1e-3), (1e8, 1e-3), (1e9, 0.1)])
def test_an_outlier_costs_no_precision(small, far, t, monkeypatch):
    """It moves the centre: about that, exponents reach 1e22, and their differences would be lost."""
    monkeypatch.setattr(es, "SMALL", small)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    x[0] = far
    z = (1 - t) * (x[1:41] + x[41:81]) / 2
    _, w, xl = truth(x, z.double(), t)
    E = EmpiricalScore(x)
    assert close(E.posterior_mean(z, t), w, xl) < 1e-5
    assert np.allclose(E.effective_size(z.double(), t).numpy(), 1 / (w**2).sum(1), rtol=1e-3)
    assert torch.equal(E.nearest(x[1:41])[1][:, 0], torch.arange(1, 41))


@pytest.mark.parametrize("small", [0, 2**24])
@pytest.mark.parametrize("radius, apart", [(3e3, 300), (1e4, 1e3), (1e5, 100)])
def test_half_way_between_two_points_far_from_the_centre(small, radius, apart, monkeypatch):
    monkeypatch.setattr(es, "SMALL", small)
    g, t = torch.Generator().manual_seed(0), 1e-3
    c, d = (size * torch.nn.functional.normalize(torch.randn(500, 64, generator=g, dtype=torch.float64))
            for size in (radius, apart))
    x = torch.cat([c, c + d]).float()
    z = (1 - t) * (x[:20].double() + x[500:520].double()) / 2 + 0.5 * t * t / apart**2 * d[:20]
    _, w, xl = truth(x, z, t)
    E = EmpiricalScore(x)
    assert close(E.posterior_mean(z, t), w, xl) < 1e-5 and E.dropped.max() <= E.tau


@pytest.mark.parametrize("small", [0, 2**24])
def test_neighbours_that_a_product_cannot_tell_apart(small, monkeypatch):
    monkeypatch.setattr(es, "SMALL", small)
    x = torch.cat([torch.ones(100), -torch.ones(100)])[:, None] * torch.tensor([[1.0, 0.0]])
    x[:, 1] = torch.arange(200) * 1e-9                       # squared, 1e-18: beside 1, nothing in float64
    E = EmpiricalScore(x)
    d2, i = E.nearest(x, 1)
    assert torch.equal(i[:, 0], torch.arange(200)) and (d2 == 0).all()
    assert (E.nearest(x[:50], 3)[0][:, 0] == 0).all()
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    x[0], t = 1e9, 0.1
    z = ((1 - t) * x[1:51] + t * torch.randn(50, 3)).double()
    gap = np.abs(np.sqrt(truth(x, z, t)[0]) / (t * np.longdouble(3)**0.5) - 1)
    r, i = EmpiricalScore(x).r_star(z, t)
    assert (gap[np.arange(50), i.numpy()] - gap.min(1) <= 1e-6).all()


def test_what_is_reported_is_below_tau():
    """Also where a query has many more survivors than another, and where exponents reach 1e20."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=g)
    x[:30] = x[0] + 1e-4 * torch.randn(30, 16, generator=g)
    E = EmpiricalScore(x)
    E.posterior_mean(torch.cat([0.99 * x[:1], 0.99 * x[35:36]]), 0.01)
    assert (E.dropped <= E.tau).all()
    for scale in (1.0, 1e5, 1e7):
        E = EmpiricalScore(scale * torch.randn(2000, 16, generator=g))
        E.posterior_mean(0.999 * E.x[:50], 1e-3)
        assert (E.dropped <= E.tau).all() and (E.dropped > 0.9 * E.tau).all()


def test_whole_numbers_beyond_fp32(monkeypatch):
    monkeypatch.setattr(es, "CACHE", 0)                      # no copies: rows are made anew each time
    x = (4_000_000_000 + np.random.default_rng(0).integers(0, 100, (500, 64))).astype(np.uint32)
    E, xd, t = EmpiricalScore(x), torch.from_numpy(x.astype(np.float64)), 1e-3
    assert torch.equal(E.nearest(xd[:20])[1][:, 0], torch.arange(20))
    assert torch.equal(E.posterior_mean((1 - t) * xd[:20], t), xd[:20])


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("n, b, k", [(2048, 256, 784), (37, 5, 4096), (1, 1, 1), (1, 1, 16), (0, 3, 16), (3, 0, 16)])
def test_a_product_errs_by_no_more_than_the_bounds_allow(n, b, k, amd, monkeypatch):
    """By rows, by columns or with gaps, MKL's or oneDNN's; the sums all of one sign, so that they grow."""
    monkeypatch.setattr(es, "amd", lambda: amd)
    g = torch.Generator().manual_seed(0)
    x, q = torch.rand(n, k, generator=g), torch.rand(b, k, generator=g)
    bound = (k + 20) * 2.0**-23 * x.double().norm(dim=1)[:, None] * q.double().norm(dim=1)
    gaps = lambda a: a.repeat_interleave(2, 1)[:, ::2]
    for rows, queries in ((x, q), (x.T.contiguous().T, q.T.contiguous().T), (gaps(x), gaps(q))):
        assert ((es.product(rows, queries) - x.double() @ q.double().T).abs() <= bound).all()


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("D", [784, 12_288])
def test_a_dense_stream_in_fp32_at_its_limit(D, amd, monkeypatch):
    """Data and queries as large as the estimate lets pass: x_* errs by 1e-5 at most, in many dimensions too."""
    monkeypatch.setattr(es, "amd", lambda: amd)
    g, t = torch.Generator().manual_seed(1), 0.5
    x = torch.randn(300, D, generator=g, dtype=torch.float64)
    z = torch.nn.functional.normalize(torch.randn(8, D, generator=g, dtype=torch.float64))
    R = (x - x.mean(0)).norm(dim=1).max()
    s = (0.8 * es.LOSS * 2**23 * t * t / (1 - t) / (1 + 1 - t) / R**2)**0.5
    x, z = (s * x).float(), (s * R * torch.linspace(0.02, 0.9, 8)[:, None] * z).float()
    E = EmpiricalScore(x)
    z64, t64, _ = E._queries(z, t)
    assert {e.dtype for _, _, rows, e, *_ in E._exponents(z64, t64, None, None, es.LOSS) if rows is not None} == \
        {torch.float32}
    _, w, xl = truth(x, z, t)
    assert close(E.posterior_mean(z, t), w, xl) < 1e-5


def test_numbers_too_small_for_fp16(monkeypatch):
    """Rounding doubles them, or makes them 0: the bounds must hold for what was made of them."""
    monkeypatch.setattr(es, "low_precision", lambda *_: torch.float16)
    monkeypatch.setattr(es, "wide", lambda _: True)
    tiny = torch.tensor(2.0**-24)
    x = (tiny * (torch.arange(1, 1002) % 2)[:, None] * torch.ones(1001, 64)).half()
    E, alpha = EmpiricalScore(x), torch.ones(2, dtype=torch.float64)
    q = tiny.double() * torch.tensor([[0.251], [-0.251]]).double() * torch.ones(2, 64)
    d2 = torch.cdist(q, E._rows(torch.arange(1001)), compute_mode="donot_use_mm_for_euclid_dist").square()
    side = E._side(q, alpha, E._levels[0])
    (_, _, index, point, lower), = E._bounds(side, E._levels[0], None, torch.ones(2, dtype=torch.bool))    # one chunk
    room = 2**-22 * side.qq[:, None] + side.tiny[:, None]
    upper = lower + (point @ side.upper.T).T
    assert E.low == torch.float16 and (lower <= d2[:, index] - side.qq[:, None] + room).all()
    assert (upper >= d2[:, index] - side.qq[:, None] - room).all()


def test_a_query_beyond_fp32_has_an_answer():
    E, z = EmpiricalScore(torch.full((300, 4), 0.5)), torch.full((2, 4), 1e33)
    assert (E.posterior_mean(z, 1e-3) == 0.5).all() and (E.sample_posterior(z, 1e-3) >= 0).all()


@pytest.mark.parametrize("small", [0, 2**24])
def test_a_draw_at_the_very_end_has_a_weight(small, monkeypatch):
    """The largest uniform number there is: rounding may leave the running sum below it."""
    monkeypatch.setattr(es, "SMALL", small)
    monkeypatch.setattr(torch, "rand", lambda n, **k: torch.full((n,), 1 - 2.0**-53, dtype=torch.float64))
    g, t = torch.Generator().manual_seed(0), 0.9
    x, y = torch.randn(3000, 4, generator=g), torch.arange(3000) % 3
    x[-30:] = 100                                            # of weight e^-200
    z = (1 - t) * x[:50] + t * torch.randn(50, 4, generator=g)
    E = EmpiricalScore(x, y, chunk=700)
    assert (E.sample_posterior(z, t) < 2970).all()
    drawn = E.sample_posterior(z, t, torch.arange(50) % 3)
    assert (drawn < 2970).all() and torch.equal(drawn % 3, torch.arange(50) % 3)


def test_labels_and_times_that_are_none():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    for kind in (np.uint8, np.uint16, np.uint32, np.uint64, np.int32):
        E = EmpiricalScore(x, (np.arange(60) % 3).astype(kind))
        assert torch.equal(E.posterior_mean(x[:9], 0.5, torch.arange(9) % 3),
                           EmpiricalScore(x, torch.arange(60) % 3).posterior_mean(x[:9], 0.5, torch.arange(9) % 3))
    with pytest.raises(ValueError, match="labels must be integers, not torch.float64"):
        EmpiricalScore(x, np.arange(60) / 2)
    with pytest.raises(ValueError, match="t must lie in"):
        E.r_star(x, 1e-30)
