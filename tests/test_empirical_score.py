"""Test the plain score against what it must be: float64 differences, the gradient of log p_t, exact probabilities."""
import numpy as np
import pytest
import scipy.stats
import torch

from empirical_score import EmpiricalScore

TIMES = [1e-3, 1e-2, 0.05, 0.3, 0.7, 0.95, 0.999, 1.0]


def clusters(N=600, d=48, seed=0):
    """Return x (N, 3, 4, 4) and y (N,): ten classes, a duplicate, near-duplicates, and class 77 with one member."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % 10
    x = 2 * torch.randn(10, d, generator=g)[y] + torch.randn(N, d, generator=g)
    x[10], x[20] = x[0], x[0] + 1e-4 * torch.randn(d, generator=g)
    y[-1] = 77
    return x.view(N, 3, 4, 4), y


def queries(x, t, B=24, seed=1):
    """Return noisy points (B, *shape). Every second one lies between two data points, where the softmax hesitates."""
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randint(len(x), (2, B), generator=g)
    i[:2], j[:2] = 0, torch.tensor([10, 20])[:B]
    mean = x[i].clone()
    mean[1::2] = (x[i][1::2] + x[j][1::2]) / 2
    return (1 - t) * mean + t * torch.randn(mean.shape, generator=g)


def logits(x, z, t):
    """Return -|z - (1 - t) x_i|^2 / (2 t^2) by differences in float64, one query at a time: (B, N)."""
    x, z = x.double().flatten(1), z.double().flatten(1)
    t = torch.as_tensor(t, dtype=torch.float64).expand(len(z))
    return torch.stack([-(zb - (1 - tb) * x).square().sum(1) / (2 * tb**2) for zb, tb in zip(z, t, strict=True)])


def reference(x, z, t):
    return (torch.softmax(logits(x, z, t), 1) @ x.double().flatten(1)).view(z.shape)


def error(a, b):
    """Return the largest error of a row of a, relative to the largest entry of that row of b."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return ((a - b).abs().amax(1) / b.abs().amax(1)).max().item()


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from the origin"])
def test_posterior_mean_equals_float64_differences(t, offset):
    x, _ = clusters()
    x = x + offset
    z = queries(x, t)
    E = EmpiricalScore(x, chunk=70)
    assert error(E.posterior_mean(z, t), reference(x, z, t)) < 1e-5
    # A float64 query gets a float64 answer. We measure its error in units of the data's spread, not of the offset.
    z = z.double()
    x_star = reference(x, z, t)
    assert error(E.posterior_mean(z, t) - offset, x_star - offset) < 1e-7
    assert error(E.score(z, t), ((1 - t) * x_star - z) / t**2) < 1e-7
    assert error(E.velocity(z, t), (z - x_star) / t) < 1e-7


@pytest.mark.parametrize("t", TIMES)
def test_score_is_the_gradient_of_log_density(t):
    x, _ = clusters(N=200)
    z = queries(x, t)
    exact = z.double().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.logsumexp(logits(x, exact, t), 1).sum(), exact)
    assert error(EmpiricalScore(x).score(z.double(), t), gradient) < 1e-7
    assert error(EmpiricalScore(x).score(z, t), gradient) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 599, 10_000])
def test_chunks_and_mixed_times_change_nothing(chunk):
    x, y = clusters()
    t = torch.tensor(TIMES).repeat(3)
    z = torch.cat([queries(x, tb.item(), B=1, seed=b) for b, tb in enumerate(t)])
    E = EmpiricalScore(x, y, chunk=chunk)
    assert error(E.posterior_mean(z, t), reference(x, z, t)) < 1e-5
    whole = EmpiricalScore(x)
    # Rows 0 and 10 are equal, so we compare the points and not their rows.
    assert torch.equal(x[E.r_star(z, t.clamp(max=0.999))[1]], x[whole.r_star(z, t.clamp(max=0.999))[1]])
    assert torch.equal(x[E.nearest(z, 5)[1]], x[whole.nearest(z, 5)[1]])


def test_class_conditional_is_the_score_of_the_class_alone():
    x, y = clusters()
    label = torch.cat([torch.arange(10).repeat(3)[:29], torch.tensor([77])])
    for t in (0.01, 0.5, 1.0):
        z = queries(x, t, B=30)
        E = EmpiricalScore(x, y, chunk=13)
        x_star, size = E.mean_and_size(z, t, label)
        for b in range(30):
            w = torch.softmax(logits(x[y == label[b]], z[b:b + 1], t), 1)
            assert error(x_star[b:b + 1], w @ x[y == label[b]].double().flatten(1)) < 1e-5
            assert abs(size[b] * w.square().sum() - 1) < 1e-5
        assert torch.equal(x_star[-1], x[-1])           # One member has all the weight.


def draws_p_value(draws, w):
    """Return the p-value of a chi-square test that the rows were drawn with probabilities w, in 12 groups of rows."""
    order = w.argsort(descending=True)
    group = torch.empty_like(order)
    group[order] = (12 * (w[order].cumsum(0) - w[order] / 2)).long().clamp(max=11)
    expected = len(draws) * torch.zeros(12, dtype=torch.float64).index_add(0, group, w)
    observed = torch.bincount(group[draws], minlength=12).double()
    observed, expected = observed[expected > 5], expected[expected > 5]
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("label", [None, 3])
@pytest.mark.parametrize("t", [0.75, 0.97])
def test_draws_follow_the_softmax(t, label):
    x, y = clusters()
    z, n, generator = queries(x, t)[5:6], 20_000, torch.Generator().manual_seed(0)
    labels = None if label is None else torch.full((n,), label)
    w = torch.softmax(logits(x, z, t)[0], 0) * (y == label if labels is not None else 1)
    w = w / w.sum()
    draws = EmpiricalScore(x, y, chunk=64).sample_posterior(z.expand(n, 3, 4, 4), t, labels, generator)
    assert (w[draws] > 0).all() and draws_p_value(draws, w) > 1e-3
    assert draws_p_value(draws, w**2 / w.square().sum()) < 1e-6         # A wrong softmax is told from the right one.


@pytest.mark.parametrize("t", TIMES)
def test_r_star_is_the_closest_to_one_of_all_points(t):
    x, _ = clusters()
    z = queries(x, t)
    r = (-2 * logits(x, z, t)).sqrt() / 48**0.5
    got, i = EmpiricalScore(x, chunk=70).r_star(z, t)
    assert ((got.double() - 1).abs() - (r - 1).abs().amin(1)).abs().max() < 1e-6 * r.max()
    assert torch.allclose(got.double(), r.gather(1, i[:, None])[:, 0], rtol=1e-5)
    # It is not the nearest point: r is .1 for the point 0, and .9 for the point 1.
    E, z = EmpiricalScore(torch.tensor([[0.0], [1.0]])), torch.tensor([[0.05]])
    assert E.r_star(z, 0.5)[1].item() == 1 and E.nearest(z, 1)[1].item() == 0


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_nearest(offset):
    x, _ = clusters()
    x = x + offset
    q = torch.cat([x[:5], queries(x, 0.3)])
    d2 = (q.double().flatten(1)[:, None] - x.double().flatten(1)).square().sum(2)
    got, i = EmpiricalScore(x, chunk=50).nearest(q, 20)
    want = d2.sort(1).values[:, :20]
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-9)
    assert torch.allclose(d2.gather(1, i), want, rtol=1e-6, atol=1e-9)


class Watched(np.memmap):
    """A memory map that remembers the most rows that were read at once."""
    most = 0

    def __getitem__(self, index):
        out = super().__getitem__(index)
        Watched.most = max(Watched.most, len(out))
        return np.array(out)


def test_a_memory_map_is_read_in_chunks(tmp_path):
    N, B, chunk = 20_000, 32, 112
    x = np.random.default_rng(0).standard_normal((N, 16)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    y, z = torch.arange(N) % 4, torch.randn(B, 16)
    E = EmpiricalScore(np.load(tmp_path / "x.npy", mmap_mode="r").view(Watched), y, chunk=chunk)
    E.score(z, 0.9, y[:B]), E.sample_posterior(z, 0.9), E.r_star(z, 0.9), E.nearest(z, 5)
    assert error(E.posterior_mean(z, 0.4), reference(torch.from_numpy(x), z, 0.4)) < 1e-5
    assert Watched.most == chunk


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_one_point_no_query_and_no_gradient(dtype):
    x, y = clusters()
    E, z, t = EmpiricalScore(x, y), queries(x, 0.4).to(dtype).requires_grad_(), torch.tensor(0.4, dtype=dtype)
    x_star = E.posterior_mean(z, t)
    assert x_star.dtype == dtype and not x_star.requires_grad
    assert error(x_star, reference(x, z.detach(), t.double())) < 2 * torch.finfo(dtype).eps
    assert torch.equal(EmpiricalScore(x[:1]).posterior_mean(z, t), x[:1].to(dtype).expand_as(z))
    assert E.score(z[:0], t, y[:0]).shape == (0, 3, 4, 4) and E.nearest(z[:0], 3)[0].shape == (0, 3)
