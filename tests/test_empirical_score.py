"""The empirical score against what it must be: float64 direct differences, autograd of log p_t, exact probabilities."""
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import empirical_score as es
from empirical_score import EmpiricalScore, score_from_x, velocity_from_x

TIMES = [1e-3, 1e-2, 0.05, 0.3, 0.7, 0.95, 0.999, 1.0]


PATHS = {"float64": (es.SMALL, torch.float32, False), "screened in fp32": (0, torch.float32, False),
         "screened in fp32 by oneDNN": (0, torch.float32, True), "screened in bf16": (0, torch.bfloat16, False)}


@pytest.fixture(autouse=True, params=PATHS)
def path(request, monkeypatch):
    """Every test four times: as small problems are answered, and as large ones, with fast bf16, without, and on AMD."""
    small, low, amd = PATHS[request.param]
    monkeypatch.setattr(es, "SMALL", small)
    monkeypatch.setattr(es, "amd", lambda: amd)
    monkeypatch.setattr(es, "low_precision", lambda *_: low)
    return request.param


def clusters(N=600, d=48, seed=0):
    """Points in ten classes, exact duplicates and near-duplicates among them. -> x (N, 3, 4, 4) float32, y (N,)."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % 10
    x = 2 * torch.randn(10, d, generator=g)[y] + torch.randn(N, d, generator=g)
    x[10], x[20] = x[0], x[0] + 1e-4 * torch.randn(d, generator=g)          # same class: 0, 10 (identical), 20 (nearly)
    x[31] = x[21] + 1e-3 * torch.randn(d, generator=g)
    y[-1] = 77                                                              # a class with one member
    return x.view(N, 3, 4, 4), y


def exponents(x, z, t):
    """Direct differences in float64: (B, N)."""
    x, z = x.double().flatten(1), z.double().flatten(1)
    t = torch.as_tensor(t, dtype=torch.float64).expand(len(z))[:, None]
    return torch.stack([-((zi - (1 - ti) * x)**2).sum(1) / (2 * ti**2) for zi, ti in zip(z, t, strict=True)])


def reference(x, z, t):
    return (torch.softmax(exponents(x, z, t), 1) @ x.double().flatten(1)).view(z.shape)


def queries(x, t, B=24, seed=1, extrapolate=True):
    """Half of them noised data points, half of them between two data points, where the softmax hesitates."""
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randint(len(x), (2, B), generator=g)
    i[0], j[0] = 0, 10
    i[1], j[1] = 0, 20                                                      # between near-duplicates
    base = x[i].clone()
    base[1::2] = (x[i][1::2] + x[j][1::2]) / 2
    return (1 - t) * base + t * torch.randn(base.shape, generator=g)


def relative(a, b):
    """Largest error of a row of a, relative to the largest entry of that row of b."""
    a, b = (c.double().view(len(c), -1) for c in (a, b))
    return ((a - b).abs().amax(1) / b.abs().amax(1).clamp_min(1e-30)).max().item()


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from the origin"])
def test_posterior_mean_equals_float64_direct_differences(t, offset):
    x, y = clusters()
    x = x + offset
    z = queries(x, t)
    E = EmpiricalScore(x, y)
    ref = reference(x, z, t)
    # what is asked of x_* itself; relative to the spread of the data, not to an offset that hides errors
    assert relative(E.posterior_mean(z, t) - offset, ref - offset) < (1e-5 if offset == 0 else 1e-3)
    assert relative(E.posterior_mean(z, t), ref) < 1e-5
    z = z.double()                                                   # float64 in, float64 out: no rounding hides errors
    ref = reference(x, z, t)
    assert relative(E.posterior_mean(z, t) - offset, ref - offset) < 1e-7
    assert relative(E.score(z, t), score_from_x(ref, z, t)) < 1e-7
    assert relative(E.velocity(z, t), velocity_from_x(ref, z, t)) < 1e-7


@pytest.mark.parametrize("t", TIMES)
def test_score_is_the_gradient_of_log_density(t):
    x, _ = clusters(N=200)
    z = queries(x, t).double().requires_grad_()
    log_p = torch.logsumexp(-((z.flatten(1)[:, None] - (1 - t) * x.double().flatten(1))**2).sum(2) / (2 * t**2), 1)
    grad, = torch.autograd.grad(log_p.sum(), z)
    assert relative(EmpiricalScore(x).score(z.detach(), t), grad) < 1e-7


def test_every_t_in_one_batch_and_extreme_chunks():
    x, y = clusters()
    t = torch.tensor(TIMES).repeat(3)
    z = torch.cat([queries(x, ti.item(), B=2, seed=k) for k, ti in enumerate(t)])
    t = t.repeat_interleave(2)
    ref = reference(x, z, t)
    for chunk in (1, 7, 599, 600, 10_000):
        assert relative(EmpiricalScore(x, y, chunk=chunk).posterior_mean(z, t), ref) < 1e-5


def test_class_conditional_is_the_score_of_the_class_alone():
    x, y = clusters()
    for t in (0.01, 0.5, 1.0):
        z = queries(x, t, B=30)
        label = torch.cat([torch.arange(10).repeat(3)[:29], torch.tensor([77])])
        got = EmpiricalScore(x, y, chunk=13).posterior_mean(z, t, label)
        for i in range(30):
            assert relative(got[i:i + 1], reference(x[y == label[i]], z[i:i + 1], t)) < 1e-5
        assert torch.equal(got[-1], x[-1])                                  # one member: the mean is that point


def test_all_classes_at_once_is_class_by_class(monkeypatch):
    """Small sets are not divided by class; points of other classes weigh nothing. Chunks that hold no point of a class
    are among these."""
    x, y = clusters()
    z, g = queries(x, 0.6, B=30), lambda: torch.Generator().manual_seed(5)
    for chunk in (7, len(x)):
        answers = []
        for small in (2**40, 0):
            monkeypatch.setattr(es, "SMALL", small)
            E = EmpiricalScore(x, y, chunk=chunk)
            groups = E._queries(z, 0.6, y[:30])[2]
            assert (len(groups) == 1) == (small > 0)
            answers.append((*E.mean_and_size(z, 0.6, y[:30]), E.sample_posterior(z, 0.6, y[:30], g()), E.dropped))
        for what, once, each in zip(("mean", "size", "draw", "dropped"), *answers, strict=True):
            once, each = once.double(), each.double()
            unit = each if what == "size" else 1                            # sizes go up to 60, and miss in proportion
            assert ((once - each).abs() < 1e-5 * unit).all(), (what, chunk)
        assert torch.equal(answers[0][2], answers[1][2])


def test_weights_sum_to_one_and_nothing_is_nan():
    x, y = clusters()
    E = EmpiricalScore(x, y, chunk=70)
    for t in TIMES:
        for scale in (1.0, 1e3):                                            # also very far outside of every shell
            z = scale * queries(x, t)
            for label in (None, torch.full((24,), 3)):
                assert E.posterior_mean(z, t, label).isfinite().all() and E.score(z, t, label).isfinite().all()
                p, _ = E._posterior(z, t, label)
                z64, t64, ((_, members, of),) = E._queries(z, t, label)
                total, seen = torch.zeros(24, dtype=torch.float64), torch.zeros(24)
                for b, _, _, e, _, base in E._exponents(z64, t64, members, of, es.LOSS):
                    w = torch.exp(e.double() + (base - p.max[b])[:, None]) / p.sum[b][:, None]
                    total[b] += w.sum(1)
                    seen[b] += (e > -torch.inf).sum(1)
                    assert w.max() <= 1 + 1e-6
                assert (total - 1).abs().max() < 1e-6
                assert (seen <= (len(x) if label is None else (y == 3).sum())).all() and (seen >= 1).all()


def test_memmap_and_half_precision_storage(tmp_path):
    x, y = clusters()
    np.save(tmp_path / "x.npy", x.half().numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    z = queries(x, 0.4)
    E = EmpiricalScore(mapped, y.numpy(), chunk=50)
    assert isinstance(E.x.base, np.memmap) or isinstance(E.x, np.memmap)    # a view of the file, not a copy
    assert relative(E.posterior_mean(z, 0.4), reference(x.half(), z, 0.4)) < 1e-5
    assert relative(E.posterior_mean(z, 0.4, y[:24]), EmpiricalScore(x.half(), y).posterior_mean(z, 0.4, y[:24])) < 1e-6


def test_dtype_device_and_single_point():
    x, _ = clusters()
    z = queries(x, 0.5)
    assert EmpiricalScore(x).score(z, 0.5).dtype == torch.float32
    one = EmpiricalScore(x[:1])
    assert torch.equal(one.posterior_mean(z, 0.5), x[:1].expand_as(z))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in [d for d, is_there in there.items() if is_there]:
        got = EmpiricalScore(x.to(device)).posterior_mean(z.to(device), 0.5)
        assert got.device.type == device and relative(got.cpu(), reference(x, z, 0.5)) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(o) and o.untyped_storage().nbytes() and not o._is_view():
                self.numel = max(self.numel, o.numel())
        return out


def test_memory_is_bounded_by_the_chunk_not_by_n(monkeypatch):
    monkeypatch.setattr(es, "SURVIVORS", 3000)                              # as large a matrix as those of a chunk
    N, d, B, chunk = 20_000, 16, 32, 112                    # a multiple of 16, as by default
    x = np.random.default_rng(0).standard_normal((N, d)).astype(np.float32)
    y, z = np.arange(N) % 4, torch.randn(B, d)
    E = EmpiricalScore(x, y, chunk=chunk)
    label = torch.arange(B) % 4
    for ask in (lambda: E.score(z, 0.9), lambda: E.score(z, 0.9, label), lambda: E.sample_posterior(z, 0.9),
                lambda: E.r_star(z, 0.9), lambda: E.nearest(z, 5), lambda: E.effective_size(z, 0.9)):
        with LargestTensor() as seen:
            ask()
        assert seen.numel <= (chunk + 5 + 4) * max(B, d), seen.numel     # far below N * d = 320,000 and B * N = 640,000


def test_effective_size():
    x, y = clusters()
    E = EmpiricalScore(x, y)
    for t in (0.05, 0.8, 1.0):
        z = queries(x, t)
        w = torch.softmax(exponents(x, z, t), 1)
        assert torch.allclose(E.effective_size(z, t).double(), 1 / w.square().sum(1), rtol=1e-5)
    assert torch.allclose(E.effective_size(z, 1.0), torch.tensor(600.0))


def chi_square(index, p):
    """-> (statistic - dof) / sqrt(2 dof), about standard normal if p is right; over bins of at least 5 expected."""
    n = len(index)
    order = p.argsort(descending=True)
    expected, observed = n * p[order], torch.bincount(index, minlength=len(p))[order].double()
    k = int((expected >= 5).sum())
    e = torch.cat([expected[:k], expected[k:].sum()[None]])
    o = torch.cat([observed[:k], observed[k:].sum()[None]])
    e, o = (e, o) if e[-1] >= 5 else (e[:-1], o[:-1])
    dof = len(e) - 1
    return (((o - e)**2 / e).sum().item() - dof) / (2 * dof)**0.5 if dof else 0.0


@pytest.mark.parametrize("label", [None, 3])
def test_draws_follow_the_exact_softmax(label):
    x, y = clusters()
    E = EmpiricalScore(x, y, chunk=64)
    members = torch.arange(len(x)) if label is None else (y == label).nonzero()[:, 0]
    for t in (0.75, 0.97):
        z = queries(x, t)[5:6]
        p = torch.softmax(exponents(x[members], z, t)[0], 0)
        n = 20_000
        draws = E.sample_posterior(z.expand(n, -1, -1, -1), t, None if label is None else torch.full((n,), label),
                                   generator=torch.Generator().manual_seed(0))
        where = torch.full((len(x),), -1)
        where[members] = torch.arange(len(members))
        assert (where[draws] >= 0).all()                                    # none outside of the class
        assert 1 / p.square().sum() > 1.5                                   # a test with one outcome would test nothing
        assert abs(chi_square(where[draws], p)) < 4
        assert abs(chi_square(where[draws], p.roll(1))) > 4                 # the test can tell a wrong p
    other = EmpiricalScore(x, y, chunk=7).sample_posterior(z.expand(100, -1, -1, -1), t, None,
                                                           generator=torch.Generator().manual_seed(3))
    same = E.sample_posterior(z.expand(100, -1, -1, -1), t, None, generator=torch.Generator().manual_seed(3))
    assert torch.equal(other, same)                                         # the chunk does not change the draw


@pytest.mark.parametrize("t", TIMES)
def test_r_star_is_the_argmin_over_all_points(t):
    x, _ = clusters()
    z = queries(x, t)
    r = (-2 * exponents(x, z, t)).sqrt() / 48**0.5                          # |z - alpha x| / (sigma sqrt d)
    want, i = (r - 1).abs().min(1)
    got, j = EmpiricalScore(x, chunk=70).r_star(z, t)
    assert ((got.double() - 1).abs() - want).abs().max() < 1e-6 * r.max()
    assert torch.allclose(got.double(), r.gather(1, j[:, None])[:, 0], rtol=1e-5)


def test_r_star_is_not_the_nearest_neighbour():
    x = torch.tensor([[0.0], [1.0]])
    z = torch.tensor([[0.05]])                                      # nearest: 0.  |z - .5 * 1| / .5 = .9 is closer to 1
    assert EmpiricalScore(x).r_star(z, 0.5)[1].item() == 1
    assert EmpiricalScore(x).nearest(z, 1)[1].item() == 0


def test_nearest():
    x, _ = clusters()
    for offset in (0.0, 1e3):
        xo = x + offset
        q = torch.cat([xo[:5], queries(x, 0.3) + offset])
        d2 = ((q.double().flatten(1)[:, None] - xo.double().flatten(1))**2).sum(2)
        got, i = EmpiricalScore(xo, chunk=50).nearest(q, 20)
        want = d2.sort(1).values[:, :20]
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-30)
        assert torch.allclose(d2.gather(1, i), want, rtol=1e-6)
    assert got[0, 0] == 0 and got[0, 1] == 0                                # the point itself and its exact duplicate


def test_log_overlap():
    x, y = clusters()
    flat = x.double().flatten(1)
    E = EmpiricalScore(x, y, chunk=37)
    for label in (None, 0, 4):
        m = torch.arange(600) if label is None else (y == label).nonzero()[:, 0]
        d2 = ((flat[m][:, None] - flat[m])**2).sum(2)
        upper = torch.triu(torch.ones_like(d2), 1).bool()
        t = torch.tensor([0.1, 0.5, 1.0])
        got = E.log_overlap(t, label)
        smallest = d2[upper & (d2 > 0)].min()
        assert torch.allclose(got.log_c, -((1 - t) / t).double()**2 * smallest / 8, rtol=1e-6)
        assert got.duplicates == int((upper & (d2 == 0)).sum()) == (0 if label == 4 else 1)
        i, j = got.pair
        assert torch.isclose((flat[i] - flat[j]).norm(), torch.tensor(got.distance, dtype=torch.float64))
    assert E.log_overlap(0.5, torch.tensor(4)).pair == got.pair
    assert E.log_overlap(0.5, 77).log_c == -torch.inf and E.log_overlap(0.5, 77).pair is None


def test_identical_points_at_the_centre_are_duplicates_too():
    E = EmpiricalScore(torch.tensor([[-1.0], [0.0], [0.0], [1.0]]))
    got = E.log_overlap(0.5)
    assert got.duplicates == 1 and got.distance == 1 and torch.isclose(got.log_c, torch.tensor(-1 / 8).double())
    same = EmpiricalScore(torch.ones(5, 3)).log_overlap(0.5)
    assert same.duplicates == 10 and same.pair is None and same.log_c == -torch.inf


def test_overlap_is_the_bhattacharyya_coefficient():
    """B.2 by quadrature, in one dimension: the integral of sqrt(p q), two Gaussians of variance sigma^2 (not sigma)."""
    t, z = 0.4, torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal((1 - t) * c, t).log_prob(z).exp() for c in (-0.7, 0.9))
    want = torch.trapezoid((p * q).sqrt(), z).log()
    got = EmpiricalScore(torch.tensor([[-0.7], [0.9]], dtype=torch.float64)).log_overlap(t).log_c
    assert torch.isclose(want, got, rtol=1e-6)


def test_conversions_invert_each_other():
    z, x, t = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), torch.rand(5) * 0.9 + 0.05
    for there, back in ((score_from_x, es.x_from_score), (velocity_from_x, es.x_from_velocity),
                        (es.noise_from_x, es.x_from_noise)):
        assert (back(there(x, z, t), z, t) - x).abs().max() < 1e-10
    eps = es.noise_from_x(x, z, t)
    assert torch.allclose(velocity_from_x(x, z, t), eps - x)                # v = dz/dt
    assert torch.allclose(score_from_x(x, z, t), -eps / t[:, None].double())


@pytest.mark.parametrize("ask, message", [
    (lambda E, z: E.score(z, 0.0), "t must lie in (0, 1]"),
    (lambda E, z: E.score(z, 1.5), "t must lie in (0, 1]"),
    (lambda E, z: E.score(z, float("nan")), "t must lie in (0, 1]"),
    (lambda E, z: E.score(z * torch.nan, 0.5), "nan or inf"),
    (lambda E, z: E.r_star(z / 0, 0.5), "nan or inf"),
    (lambda E, z: E.score(z, 0.5, torch.full((len(z),), 99)), "no data point has label [99]"),
    (lambda E, z: E.log_overlap(0.5, 99), "no data point has label [99]"),
    (lambda E, z: E.score(z[:, :1], 0.5), "queries must have shape (B, 3, 4, 4)"),
    (lambda E, z: E.nearest(z, 601), "k must lie between 1"),
    (lambda E, z: EmpiricalScore(E.x).score(E.x[:3], 0.5, 1), "without labels"),
    (lambda E, z: EmpiricalScore(E.x, [1, 2]), "600 points need 600 labels"),
    (lambda E, z: EmpiricalScore(E.x * torch.nan), "data hold nan"),
    (lambda E, z: EmpiricalScore(E.x[:0]), "empty"),
    (lambda E, z: EmpiricalScore(E.x[:, 0]), "must have shape (N, *shape)"),
    (lambda E, z: E.score(z, torch.full((5,), 0.5)), "need t of shape () or (24,), not (5,)"),
    (lambda E, z: E.score(z, 0.5, torch.zeros(5, dtype=torch.int64)), "need labels of shape () or (24,), not (5,)"),
    (lambda E, z: E.score(z.long(), 0.5), "must be floating point"),
    (lambda E, z: E.score(z, torch.full((len(z), 1), 0.5)), "need t of shape () or (24,), not (24, 1)"),
    (lambda E, z: E.score(z.numpy(), 0.5), "z must be a tensor, not ndarray"),
    (lambda E, z: E.score(z.half(), 0.001), "overflows torch.float16: ask with z.float()"),
    (lambda E, z: EmpiricalScore("data/x.npy"), "a tensor, an array or a memory map, not str"),
    (lambda E, z: EmpiricalScore(E.x, chunk=0), "chunk must be at least 1"),
    (lambda E, z: EmpiricalScore(E.x, split="rows"), "split must be 'queries', 'points' or None, not 'rows'"),
])
def test_errors_name_what_was_wrong(ask, message):
    x, y = clusters()
    with pytest.raises(ValueError) as e:
        ask(EmpiricalScore(x, y), queries(x, 0.5))
    assert message in str(e.value) and "\n" not in str(e.value)


def answers(E, seed):
    """Every public method on every kind of query -> {what was asked: (results ..)}."""
    x, y = clusters()
    z, each = queries(x, 0.8)[:23], torch.tensor(TIMES).repeat(3)[:23]
    label = torch.cat([y[:22], torch.tensor([77])])
    asked = {"spread": (z, 0.8), "spread, classes": (z, 0.8, label), "one class": (z, 0.8, 3),
             "collapsed": (queries(x, 0.1)[:23], torch.tensor(0.1)), "every t": (z, each, label.flip(0)),
             "float64": (z.double(), each.double()), "bfloat16": (z.bfloat16(), 0.8),
             "fewer than ranks": (z[:2], each[3:5], label[:2]), "one": (z[:1], 0.3), "none": (z[:0], 0.8)}
    out = {}
    for name, ask in asked.items():
        out[name, "mean"], out[name, "size"] = E.mean_and_size(*ask)
        out[name, "dropped"], out[name, "nearest"] = E.dropped, E.nearest(ask[0], 7)
        out[name, "draw"] = E.sample_posterior(*ask, generator=torch.Generator().manual_seed(seed))
        out[name, "r_star"] = E.r_star(ask[0], torch.as_tensor(ask[1]).clamp(max=0.999))    # at t = 1 all points tie
    for method in ("posterior_mean", "score", "velocity", "effective_size"):
        out[method, "size" if method == "effective_size" else "mean"] = getattr(E, method)(z, each, label)
    for label in (None, 3, 77):
        log_c, distance, pair, duplicates = E.log_overlap(torch.tensor([0.3, 1.0]), label)
        out["overlap", label] = log_c, torch.tensor([*(pair or (-1, -1)), duplicates]), torch.tensor([distance])
    return {key: got if isinstance(got, tuple) else (got,) for key, got in out.items()}


def several_ranks(rank, folder):
    """In one process group of three and one of two: answers in both ways to divide the work, and what goes wrong."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    x, y = clusters()
    groups = {3: dist.group.WORLD, 2: dist.new_group([0, 1])}
    for world, path, split in itertools.product(groups, PATHS, ("queries", "points")):
        if rank >= world: continue
        es.SMALL, low, amd = PATHS[path]
        es.low_precision, es.amd = lambda *_, low=low: low, lambda amd=amd: amd
        E = EmpiricalScore(x, y, chunk=150, process_group=groups[world], split=split)
        z, t, labels = queries(x, 0.8), torch.full((24,), 0.8), torch.zeros(24, dtype=torch.int64)
        bad = z.clone()
        bad[1], t[2], labels[3] = torch.nan, 0, 99           # each in the turn of one rank alone: all must raise
        for method, ask in ((E.score, (bad, 0.8)), (E.r_star, (bad, 0.8)), (E.nearest, (bad, 3)),
                            (E.sample_posterior, (z, t)), (E.velocity, (z, 0.8, labels))):
            with pytest.raises(ValueError):
                method(*ask)
        # generators differ: rank 0's must be used
        torch.save(answers(E, rank + 5), f"{folder}/{world}, {path}, {split}, {rank}.pt")
    # By memory, and the same on all ranks even where one alone asks for something else. More ranks than points, too.
    assert EmpiricalScore(x, process_group=dist.group.WORLD).split == "queries"
    assert EmpiricalScore(x, process_group=dist.group.WORLD, split=[None, "points", None][rank]).split == "points"
    few = EmpiricalScore(x[:2], process_group=dist.group.WORLD, split="points").nearest(x[:5], 2)[1]
    assert torch.equal(few, EmpiricalScore(x[:2]).nearest(x[:5], 2)[1])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(several_ranks, (str(folder),), nprocs=3)
    return folder


@pytest.mark.parametrize("world, split", [*itertools.product((2, 3), ("queries", "points"))])
def test_several_ranks_agree_with_one(world, split, path, ranks_folder):
    E = EmpiricalScore(*clusters())
    ranks = [torch.load(ranks_folder / f"{world}, {path}, {split}, {r}.pt") for r in range(world)]
    for key, want in answers(E, 5).items():
        for got in ranks:                                    # every rank the same, to the last bit
            assert all(map(torch.equal, got[key], ranks[0][key])), key
        for a, b in zip(ranks[0][key], want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, key
            if key[-1] == "dropped":
                assert (a <= 2 * E.tau).all() and (a >= 0).all(), key
            elif not torch.equal(a, b):
                # sizes have w^2, and miss twice what means do, in fp32; bf16 results may be rounded either way
                bound = 2**-7 if a.dtype == torch.bfloat16 else 1e-5 if key[-1] == "size" else 1e-6
                assert a.is_floating_point() and relative(a, b) < bound, key


@pytest.mark.parametrize("t", [0.02, 0.3, 0.6, 0.95])
def test_many_points_are_screened_along_few_directions_first(t, monkeypatch):
    """Points that vary little in most directions, as images do, in an order that is no random one."""
    monkeypatch.setattr(es, "FEW", dict.fromkeys(es.FEW, 16))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 256, generator=g) * torch.arange(1, 257)**-0.7
    x = x[x[:, 0].argsort()] + 3
    x[7] = x[3]
    E = EmpiricalScore(x, chunk=400)
    assert E._levels[0].V.shape == (256, 32) and E._levels[1].V is None
    z = (1 - t) * x[:40] + t * torch.randn(40, 256, generator=g)
    d2 = (z.double()[:, None] - (1 - t) * x.double()).square().sum(2)
    assert relative(E.posterior_mean(z, t), torch.softmax(-d2 / (2 * t * t), 1) @ x.double()) < 1e-5
    r = d2.sqrt() / (t * 16)
    got, i = E.r_star(z, t)
    assert ((r.gather(1, i[:, None])[:, 0] - 1).abs() <= (r - 1).abs().amin(1) + 1e-9).all()
    d2 = (z.double()[:, None] - x.double()).square().sum(2)
    assert torch.allclose(E.nearest(z, 3)[0].double(), d2.sort(1)[0][:, :3])


@pytest.mark.parametrize("huge", [[3], [3, 20], [*range(39)]])
def test_queries_too_large_for_the_bounds_leave_the_others_of_their_batch_alone(huge, monkeypatch):
    monkeypatch.setattr(es, "FEW", dict.fromkeys(es.FEW, 16))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 256, generator=g) * torch.arange(1, 257)**-0.7
    E, z = EmpiricalScore(x, chunk=400), 0.8 * x[:40] + 0.2 * torch.randn(40, 256, generator=g)
    alone = E.posterior_mean(z, 0.2)
    z[huge] *= 1e20
    got, rest = E.posterior_mean(z, 0.2), torch.ones(40, dtype=torch.bool)
    rest[huge] = False
    assert relative(got[rest], alone[rest]) < 1e-6
    # of so far away, the density is that of the point that lies farthest in that direction
    assert torch.allclose(got[huge], x[(z[huge].double() @ x.double().T).argmax(1)], atol=1e-6)


@pytest.mark.parametrize("d, few", [(1024, False), (2048, True)])
def test_in_bf16_few_directions_come_first_where_points_have_thousands(d, few, path):
    if path == "screened in bf16":
        assert (EmpiricalScore(torch.randn(600, d))._levels[0].V is not None) == few
