"""
FastEmpiricalScore: the methods and the answers of EmpiricalScore, several times as fast where few points have weight.

At small t nearly all weights of the softmax are zero, and it takes no precision to prove it. So there are two passes.

1. Screening. A product in low precision, along an eighth of the directions, bounds every squared distance from below. We
   strike all points that weigh less than tau / N of the heaviest even if their bound is the truth. Rounding and the other
   directions can change a product; `query_side` bounds by how much. So what we strike is certain to be light.
2. The points that survive get their exact distances, by differences in float64. The softmax is over them alone.

What we strike weighs less than tau = 1e-7 of the total; `posterior_mean_and_bound` returns the bound that was reached.
Where more than one point in 32 survives (the weights are spread, t is near 1), a finer screening follows, along all
directions. Where this strikes too little as well, EmpiricalScore answers. So it does for small questions.
"""
import contextlib
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from empirical_score import EmpiricalScore, as_query

# Questions with fewer queries x points x dimensions go to EmpiricalScore: two float64 products are quicker than a proof.
SMALL = {"cpu": 2**24, "cuda": 2**34}
# We give up a query when more than this share of the points survives its screening, or when pairs fill the memory.
SHARE, PAIRS = 1 / 32, 2**24
# Queries x points of a chunk: the largest matrix. And the lengths that bounds in float32 are made for.
BLOCK, HUGE = {"cpu": 2**24, "cuda": 2**26}, 1e15


@dataclass
class Level:
    """A way to screen: the coordinates c of the points along some directions, in low precision.

    V (D, k) holds orthonormal directions, and c = low(V^T x) stays in memory. V None: all directions, and c = low(x) is
    made chunk by chunk. The columns of a point are |x|^2, a bound on |x| and |c|, and a bound on |x - V c|, the part
    that the directions do not see.
    """
    dtype: torch.dtype
    columns: torch.Tensor            # (N, 3) float32
    kappa: float                     # |V^T x - c| <= kappa |x| for every point: rounding of the points
    V: torch.Tensor | None = None    # (D, k) float64
    c: torch.Tensor | None = None    # (N, k)
    lose: float = 0.0                # what a float64 product with V loses, relatively


@dataclass
class Side:
    """What screening needs to know of the queries; see `query_side`.

    The columns of a point times `lower`, minus the product, bound |q - alpha x|^2 - |q|^2 from below. Times `upper`, from
    above. Times `middle`, they estimate it.
    """
    low: torch.Tensor                # (B, k)  2 alpha q along the directions, in low precision
    middle: torch.Tensor             # (B, 3)
    lower: torch.Tensor              # (B, 3)
    upper: torch.Tensor              # (B, 3)
    slip: torch.Tensor               # (B,)    what underflow and float64 may change
    qq: torch.Tensor                 # (B,)    |q|^2

    def take(self, queries):
        """Return the side of some of the queries."""
        return Side(*(value[queries] for value in vars(self).values()))

    def compare(self, coefficients, c, columns):
        """Return columns x coefficients - product, (n, B), for points with these coordinates and columns."""
        return torch.addmm(product(c, self.low), columns, coefficients.T, beta=-1)


@dataclass
class Survivors:
    """Pairs of a query and a point that may matter to it. For a complete query, all other points are certain not to."""
    query: torch.Tensor     # (P,)
    point: torch.Tensor     # (P,)  row of the data
    d2: torch.Tensor        # (P,)  |z - alpha x|^2 in float64
    complete: torch.Tensor  # (B,)  False: too many points may matter, and the query has no pairs here


@contextlib.contextmanager
def exact_float32(device):
    """Switch off, for a while, what makes float32 products less exact than float32: TF32, bf16, autocast."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def low_precision(device):
    """Return bfloat16 where its products are fast and their sums come in float32: on Nvidia's GPUs. Else float32."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def product(a, b):
    """Return a @ b.T in float32. Tensor cores need multiples of 8."""
    if a.dtype == torch.float32:
        return a @ b.T
    n = len(b)
    b = torch.nn.functional.pad(b, (0, 0, 0, -n % 8))
    return torch.mm(a, b.T, out_dtype=torch.float32)[:, :n]


class FastEmpiricalScore(EmpiricalScore):
    """Answer what EmpiricalScore answers, faster. It leaves out points of a total weight of at most tau.

    chunk   data points per step; default: 4,096, and 65,536 on a GPU.
    Beside the data it keeps an eighth of them in memory, in float32, or in bfloat16 on a GPU.
    """

    def __init__(self, x, y=None, device=None, chunk=None, tau=1e-7):
        if not 0 < tau < 1:
            raise ValueError(f"tau must lie in (0, 1), not {tau}")
        super().__init__(x, y, device, chunk or 4096)
        if chunk is None and self.device.type == "cuda":
            self.chunk = 2**16
        self.tau = tau
        self.piece = max(1, 2**22 // self.D)
        # Differences to the centre round once if the centre is a number of the precision that they are taken in.
        sample = torch.as_tensor(x[:1])
        exact = sample.itemsize <= 4 if sample.is_floating_point() else sample.itemsize <= 2
        self.work = torch.float32 if exact else torch.float64
        self.centre = self.centre.to(self.work).double()

    # ---- what one asks -----------------------------------------------------------------------------------------------

    def posterior_mean_and_bound(self, z, t, y=None):
        """Return x_* (B, *shape) and a bound on the weight, of a total of 1, that it leaves out (B,)."""
        z64, t64 = self.queries(z, t)
        x_star, bound = torch.empty_like(z64), torch.empty_like(t64[:, 0])
        for b, rows in self.groups(y, len(z)):
            x_star[b], _, bound[b] = self.softmax_mean_and_bound(z64[b], t64[b], rows)
        return as_query(x_star.view_as(z), z), as_query(bound, z)

    def softmax_mean(self, z, t, rows):
        """Return x_* (B, D) and the effective number of points (B, 1), over the data points `rows`."""
        mean, size, _ = self.softmax_mean_and_bound(z, t, rows)
        return mean, size

    def softmax_mean_and_bound(self, z, t, rows):
        """Return x_* (B, D), the effective number of points (B, 1) and a bound on the weight left out (B,)."""
        found = self.survivors_of_softmax(z, t, rows)
        count = self.N if rows is None else len(rows)
        mean, size, bound = self.mean_of_survivors(found, t, count)
        rest = ~found.complete
        if rest.any():
            mean[rest], size[rest] = super().softmax_mean(z[rest], t[rest], rows)
            bound[rest] = 0
        return mean, size, bound

    def sample_posterior(self, z, t, y=None, generator=None):
        """Return one row of the data per query (B,), drawn with the probabilities w_i, but for the weight left out."""
        z64, t64 = self.queries(z, t)
        draw = torch.full((len(z),), -1, device=self.device)
        for b, rows in self.groups(y, len(z)):
            found = self.survivors_of_softmax(z64[b], t64[b], rows)
            gumbel = -torch.empty_like(found.d2).exponential_(generator=generator).log()
            value = gumbel - found.d2 / (2 * t64[b][found.query, 0]**2)
            best = value == largest(value, found.query, len(b))[found.query]
            draw[b[found.query[best]]] = found.point[best]
        rest = draw < 0
        if rest.any():
            labels = None if y is None else torch.as_tensor(y).cpu()[rest.cpu()]
            drawn = super().sample_posterior(z[rest.to(z.device)], t64[rest, 0], labels, generator)
            draw[rest] = drawn.to(self.device)
        return draw.to(z.device)

    @torch.no_grad()
    def r_star(self, z, t):
        """Return the r_i = |z - (1 - t) x_i| / (t sqrt D) closest to 1 over all data, and its i, both (B,).  Eq. (4)"""
        z64, t64 = self.queries(z, t)
        unit = t64.square() * self.D
        d2, index, rest = self.best_of_survivors(z64, t64, 1, unit)
        r = (d2 / unit).sqrt()[:, 0].to(z.dtype)
        index = index[:, 0]
        if rest.any():
            r_rest, index_rest = super().r_star(z[rest.to(z.device)], t64[rest, 0])
            r[rest], index[rest] = r_rest.to(self.device), index_rest.to(self.device)
        return as_query(r, z), index.to(z.device)

    @torch.no_grad()
    def nearest(self, x, k=1):
        """Return the squared distances of x (B, *shape) to its k nearest points, ascending, and their rows: (B, k)."""
        x64, t64 = self.queries(x, 1.0)
        d2, index, rest = self.best_of_survivors(x64, 0 * t64, min(k, self.N))
        d2 = d2.to(x.dtype)
        if rest.any() or k > self.N:
            d2_rest, index_rest = super().nearest(x[rest.to(x.device)], k)
            d2[rest], index[rest] = d2_rest.to(self.device), index_rest.to(self.device)
        return as_query(d2, x), index.to(x.device)

    # ---- what the survivors say --------------------------------------------------------------------------------------

    def survivors_of_softmax(self, z, t, rows):
        """Return all points that weigh more than tau / N of the heaviest, of those in `rows`."""
        slack = 2 * t[:, 0].square() * math.log(self.N / self.tau)
        return self.screen(z, t, rows, slack=slack)

    def mean_of_survivors(self, found, t, count):
        """Return x_* (B, D), effective size (B, 1) and the bound on what is left out (B,) of a softmax over `count`."""
        B, light = len(t), self.tau / self.N
        logit = -found.d2 / (2 * t[found.query, 0]**2)
        w = (logit - largest(logit, found.query, B)[found.query]).exp()
        heavy = w >= light
        w, query, point = w[heavy], found.query[heavy], found.point[heavy]
        total = w.new_zeros(B).index_add(0, query, w)
        squares = w.new_zeros(B).index_add(0, query, w.square())
        weighted = w.new_zeros(B, self.D)
        for part in torch.arange(len(w), device=self.device).split(self.piece):
            weighted.index_add_(0, query[part], w[part, None] * self.points(point[part]))
        left_out = (count - torch.bincount(query, minlength=B)) * light
        return weighted / total[:, None], (total**2 / squares)[:, None], left_out / total

    def best_of_survivors(self, z, t, k, unit=None):
        """Find the k points with the smallest distance d, or with d^2 / unit closest to 1.

        Return their d^2 and their rows, (B, k), the best first, and which queries have no answer (B,).
        """
        d2 = z.new_full((len(z), k), torch.nan)
        index = torch.zeros_like(d2, dtype=torch.long)
        rest = torch.ones_like(d2[:, 0], dtype=torch.bool)
        for b, _ in self.groups(None, len(z)):
            found = self.screen(z[b], t[b], None, k, unit=None if unit is None else unit[b, 0])
            key = found.d2
            if unit is not None:
                key = ((key / unit[b, 0][found.query]).sqrt() - 1).abs()
            order = key.argsort(stable=True)
            order = order[found.query[order].argsort(stable=True)]
            query = found.query[order]
            count = torch.bincount(query, minlength=len(b))
            place = torch.arange(len(query), device=self.device) - (count.cumsum(0) - count)[query]
            order, query, place = order[place < k], query[place < k], place[place < k]
            d2[b[query], place] = found.d2[order]
            index[b[query], place] = found.point[order]
            rest[b] = ~found.complete
        return d2, index, rest

    # ---- screening ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def screen(self, z, t, rows, k=1, slack=0.0, unit=None):
        """Return the Survivors: all points of `rows` that may be among the k best, or within `slack` of the best d^2.

        The best have the smallest d^2 = |z - alpha x|^2, or sqrt(d^2 / unit) closest to 1 for a unit (B,).
        """
        alpha = 1 - t
        q = z - alpha * self.centre
        count = self.N if rows is None else len(rows)
        large = len(z) * count * self.D > SMALL[self.device.type]
        limit = max(32 * k, min(count * SHARE, PAIRS / max(1, len(z))))
        complete = torch.zeros(len(z), dtype=torch.bool, device=self.device)
        queries, points = [complete[:0].long()], [complete[:0].long()]
        bracket = None
        with exact_float32(self.device):
            for level in self.levels if large else ():
                (ask,) = torch.where(~complete & (q.norm(dim=1) < HUGE))
                side = self.query_side(q[ask], alpha[ask], level)
                if bracket is None:
                    bracket = z.new_zeros(2, len(z))
                    bracket[:, ask] = self.bracket(z[ask], t[ask], side, level, rows, k, slack, unit)
                low, high = bracket[:, ask]
                query, point, done = self.collect(side, level, rows, None if unit is None else low, high, limit)
                complete[ask[done]] = True
                queries.append(ask[query])
                points.append(point)
        query, point = torch.cat(queries), torch.cat(points)
        return Survivors(query, point, self.exact_d2(z, t, query, point), complete)

    def bracket(self, z, t, side, level, rows, k, slack, unit):
        """Return bounds on the d^2 of all survivors, from the exact d^2 of the k likeliest points: (2, B)."""
        target = None if unit is None else (unit - side.qq).float()
        likely = self.search(side, level, rows, k, target)
        query = torch.arange(len(z), device=self.device).repeat_interleave(k)
        d2 = self.exact_d2(z, t, query, likely.flatten()).view(-1, k)
        if unit is None:
            high = d2.amax(1) + slack
            return torch.stack([torch.zeros_like(high), high])
        gap = ((d2[:, 0] / unit).sqrt() - 1).abs()
        return torch.stack([unit * (1 - gap).clamp(min=0).square(), unit * (1 + gap).square()])

    def search(self, side, level, rows, k, target):
        """Return the points with the k smallest estimates of d^2, or the closest to `target`: (B, k)."""
        best = torch.zeros(0, len(side.qq), device=self.device)
        likely = best.long()
        for index, c, columns in self.coordinates(level, rows):
            estimate = side.compare(side.middle, c, columns)                        # (n, B)
            if target is not None:
                estimate = estimate.sub_(target).abs_()
            if k == 1:
                here, place = estimate.min(0, keepdim=True)
            else:
                here, place = estimate.topk(min(k, len(index)), dim=0, largest=False)
            best, likely = torch.cat([best, here]), torch.cat([likely, index[place]])
            best, order = best.topk(min(k, len(best)), dim=0, largest=False)
            likely = likely.gather(0, order)
        return likely.T

    def collect(self, side, level, rows, low, high, limit):
        """Return (query (P,), point (P,), complete (B,)): all pairs whose bounds allow a d^2 from `low` to `high`.

        A query that has more than `limit` of them is not complete, and none of its pairs are returned.
        """
        complete = torch.zeros_like(high, dtype=torch.bool)
        high = high - side.qq + 2.0**-40 * (high + side.qq) + side.slip
        high = (high + 2.0**-22 * high.abs()).float()
        if low is not None:
            low = low - side.qq - 2.0**-40 * (low + side.qq) - side.slip
            low = (low - 2.0**-22 * low.abs()).float()
        live = torch.arange(len(high), device=self.device)
        seen = torch.zeros_like(live)
        queries, points = [live[:0]], [live[:0]]
        for index, c, columns in self.coordinates(level, rows):
            hit = side.compare(side.lower, c, columns) <= high                      # (n, B)
            if low is not None:
                hit &= side.compare(side.upper, c, columns) >= low
            seen = seen + hit.sum(0)
            few = seen <= limit
            if not few.all():
                side, live, seen, high, hit = side.take(few), live[few], seen[few], high[few], hit[:, few]
                low = None if low is None else low[few]
            if len(live) == 0:
                break
            place, query = hit.nonzero(as_tuple=True)
            queries.append(live[query])
            points.append(index[place])
        complete[live] = True
        query, point = torch.cat(queries), torch.cat(points)
        keep = complete[query]
        return query[keep], point[keep], complete

    def exact_d2(self, z, t, query, point):
        """Return |z - (1 - t) x|^2 of pairs, by differences in float64: (P,)."""
        found = [z.new_zeros(0)]
        for b, i in zip(query.split(self.piece), point.split(self.piece), strict=True):
            found.append((z[b] - (1 - t[b]) * self.points(i)).square().sum(1))
        return torch.cat(found)

    def query_side(self, q, alpha, level):
        """Return what the bounds need of the queries q = z - alpha centre, (B, D) in float64.

        |q - alpha x|^2 = |q|^2 + alpha^2 |x|^2 - u.x, where u = 2 alpha q and x is relative to the centre. Let a = low(V^T u),
        and let u~ and x~ be the parts of u and x that V does not see. The product p = a.c misses u.x by at most

            |u~| |x~| + kappa |V^T u| |x|       by Cauchy and Schwarz, beyond the directions and along them
            + |a - V^T u| |c|                   because we round the query
            + (k + 20) 2^-23 |a| |c|            because we add k products in float32: twice what this can lose
        """
        u = 2 * alpha * q
        inside, outside = u, torch.zeros_like(u)
        if level.V is not None:
            inside = u @ level.V
            outside = u - inside @ level.V.T
        low = inside.to(level.dtype)
        k = low.shape[1]
        length, qq = u.norm(dim=1), q.square().sum(1)
        rounded = (low.double() - inside).norm(dim=1) + (k + 20) * 2.0**-23 * low.double().norm(dim=1)
        at_x = rounded + level.kappa * inside.norm(dim=1) + level.lose * length
        at_beyond = outside.norm(dim=1) + level.lose * length
        # The bounds themselves are computed in float32, which this allows for.
        width = torch.stack([2.0**-20 * alpha[:, 0].square(), at_x, at_beyond], 1) * (1 + 2.0**-18)
        middle = torch.zeros_like(width)
        middle[:, 0] = alpha[:, 0].square()
        slip = k * 2.0**-122 * (1 + length + self.radius)
        slip = slip + 2.0**-50 * self.centre.norm() * (qq.sqrt() + self.radius)
        return Side(low, middle.float(), (middle - width).float(), (middle + width).float(), slip, qq)

    # ---- the data, as screening reads them ---------------------------------------------------------------------------

    @functools.cached_property
    def levels(self):
        """The ways to screen, the cheapest first. Empty where numbers are too large or too small for float32."""
        squares = [(points - self.centre).square().sum(1) for _, points in self.chunks()]
        squares = torch.cat(squares)
        self.radius = squares.max().sqrt()
        if not 1 / HUGE < self.radius < HUGE:
            return []
        low = low_precision(self.device)
        columns = torch.stack([squares, squares.sqrt() * (1 + 2.0**-7), 0 * squares], 1).float()
        levels = [Level(torch.float32, columns, 2.0**-23)]
        if low == torch.bfloat16:
            levels.insert(0, Level(low, columns, 1.02 * 2.0**-9))
        k = min(self.D // 8, self.N // 32, 512)
        if k >= 16:
            levels.insert(0, self.principal_level(k, low, squares))
        return levels

    def principal_level(self, k, dtype, squares):
        """Return the Level of k directions in which the points vary most, or nearly so. The bounds hold for any."""
        sample = torch.linspace(0, self.N - 1, min(self.N, max(1024, 4 * k))).long()
        some = (self.points(sample) - self.centre) / self.radius
        V = torch.randn(self.D, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.device)
        for _ in range(3):
            V = torch.linalg.qr(some.T @ (some @ V)).Q
        lose = (self.D + 64) * k**0.5 * 2.0**-50
        identity = torch.eye(k, dtype=torch.float64, device=self.device)
        skew = (V.T @ V - identity).norm() + lose                                   # V is not quite orthonormal
        c = torch.empty(self.N, k, dtype=dtype, device=self.device)
        columns = torch.empty(self.N, 3, device=self.device)
        kappa = 0.0
        for index, points in self.chunks():
            inside = (points - self.centre) @ V                                     # (n, k)
            c[index] = inside.to(dtype)
            low, square = c[index].double(), squares[index]
            size = low.square().sum(1)
            # |x - V c|^2 = |x|^2 - 2 c.V^T x + |V c|^2
            rest = square - 2 * (low * inside).sum(1) + (1 + skew) * size + lose * (square + size)
            error = (inside - low).norm(dim=1) + skew * size.sqrt() + lose * square.sqrt()
            kappa = max(kappa, (error / square.sqrt().clamp(min=1e-150)).max().item())
            columns[index, 0] = square.float()
            columns[index, 2] = (rest.clamp(min=0).sqrt() * (1 + 2.0**-20)).float()
        columns[:, 1] = (squares.sqrt() * (1 + max(2.0**-7, 1.01 * kappa))).float()
        return Level(dtype, columns, kappa, V, c, lose)

    def coordinates(self, level, rows):
        """Yield (row numbers (n,), coordinates (n, k), columns (n, 3)) chunk by chunk, of `rows` or of all data."""
        everything = torch.arange(self.N, device=self.device) if rows is None else rows.to(self.device)
        for start in range(0, len(everything), self.chunk):
            index = everything[start:start + self.chunk]
            where = slice(start, start + self.chunk) if rows is None else index
            c = self.low_points(where, level.dtype) if level.c is None else level.c[where]
            yield index, c, level.columns[where]

    def low_points(self, where, dtype):
        """Return the points at a slice or at row numbers, relative to the centre and in low precision: (n, D)."""
        if torch.is_tensor(self.x):
            points = self.x[where if isinstance(where, slice) else where.to(self.x.device)]
        else:
            points = torch.as_tensor(np.array(self.x[where if isinstance(where, slice) else where.cpu().numpy()]))
        points = points.flatten(1).to(self.device).to(self.work)
        return (points - self.centre.to(self.work)).to(dtype)

    def groups(self, y, B):
        """Yield (queries (b,), rows) as EmpiricalScore does, but no more queries at once than memory holds."""
        block = max(1, BLOCK[self.device.type] // self.chunk)
        everyone = torch.arange(B)
        for b, rows in super().groups(y, B):
            for part in everyone[b].split(block):
                yield part.to(self.device), rows


def largest(value, query, B):
    """Return the largest value of each query, -inf for a query without any: (B,)."""
    return value.new_full((B,), -torch.inf).scatter_reduce(0, query, value, "amax")


def make_score(data, device, fast):
    """Return the empirical score of a data set: this engine, or the plain one, which takes longer for the same numbers."""
    kind = FastEmpiricalScore if fast else EmpiricalScore
    return kind(data["x"], data["y"], device=device)
