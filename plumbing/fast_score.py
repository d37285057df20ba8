"""
FastEmpiricalScore: the answers of EmpiricalScore, several times as fast over many points.

At small t nearly all weights of the softmax are zero, and it takes no float64 to prove it. So there are two passes.

1. Screening. A float32 product along an eighth of the directions bounds every squared distance from below. We strike a
   point if it weighs less than TAU / N of the heaviest even should the bound be its distance. `slip` bounds what
   float32 can change. So all that we strike is certain to be light.
2. The points that survive get their exact distances, by differences in float64. The softmax is over them alone.

What we strike weighs less than TAU of the total. `posterior_mean_and_bound` returns the bound that was reached.
If more than one point in 32 survives, we screen along all directions. If that strikes too little as well, as at t near
1, all points count: in float32 where this costs x_* less than 1e-5, else as in EmpiricalScore.

r_star, nearest and draws are those of EmpiricalScore. tests/test_fast_score.py searches for data that break the bounds.
"""
import contextlib
import functools
import math
from dataclasses import dataclass

import torch

from empirical_score import EmpiricalScore, as_query

TAU = 1e-7
# This share of the points may survive for a query, and FEW more. Along all directions MORE times as many may, where the
# query would otherwise need a stream in float64, which costs about as much.
SHARE, FEW, MORE = 1 / 32, 32, 4
# A logit may lose this much in float32, by the estimate in `fits_float32`. Then x_* loses 1e-5 at most, as measured.
LOSS = 5e-5
# float32 cannot hold the squares of lengths far below TINY or far above HUGE.
TINY, HUGE = 1e-15, 1e15


@dataclass
class Sketch:
    """Coordinates x = V c + rest of the points, relative to their centre.

    A column of `points` is c (k of them), the length of the rest, or |x|^2.
    """
    V: torch.Tensor                  # (D, k) float64, orthonormal
    points: torch.Tensor             # (N, k + 2) float32
    radius: float                    # the largest |x|; inf beyond HUGE, and then nothing is struck


@dataclass
class Survivors:
    """Pairs of a query and a point that may matter to it. For a complete query, all other points are certain not to."""
    query: torch.Tensor              # (P,)
    point: torch.Tensor              # (P,)    row of the data
    d2: torch.Tensor                 # (P,)    |z - alpha x|^2 in float64
    complete: torch.Tensor           # (B,)    False: too many points may matter, and the query has no pairs here
    dense_query: torch.Tensor        # (b,)    all queries that are not complete, and maybe others
    dense: torch.Tensor              # (b, n)  their |z - alpha x|^2 in float32, less a constant

    def logits(self, t):
        """Return -d2 / (2 t^2), (P,)."""
        t = t[self.query, 0]
        return -self.d2 / (2 * t**2)


@contextlib.contextmanager
def exact_float32(device):
    """Switch off, for a while, what makes float32 products less exact than float32: TF32, bfloat16, autocast."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def strike(lower, high, limit):
    """Return the pairs with lower (B, n) <= high (B,), as (query (P,), column (P,)), and which queries are complete.

    A query with more than `limit` pairs is not complete (B,), and returns none.
    """
    high = (high + 2.0**-22 * high.abs()).float()
    # What has overflowed to nan is not struck.
    hit = ~(lower > high[:, None])
    count = hit.sum(1, dtype=torch.int32)
    complete = count <= limit
    (open_queries,) = torch.where(complete)
    query, column = hit[complete].nonzero(as_tuple=True)
    return open_queries[query], column, complete


def largest(value, query, B):
    """Return the largest value of each query, -inf for a query without any: (B,)."""
    none = torch.full((B,), -torch.inf, dtype=torch.float64, device=value.device)
    return none.scatter_reduce(0, query, value, "amax")


class FastEmpiricalScore(EmpiricalScore):
    """Answer what EmpiricalScore answers, faster, and leave out points that weigh at most TAU together.

    Beside the data, it keeps an eighth of them in memory, in float32.
    """

    def __init__(self, x, y=None, device=None, chunk=4096):
        super().__init__(x, y, device, chunk)
        # `small`: the queries x points x dimensions below which EmpiricalScore is quicker.
        # `block`: queries at once; a matrix (block, N) fits into memory. `piece`: points at once; they fit into caches.
        if self.device.type == "cuda":
            self.small = 2**34
            self.block = max(1, 2**30 // self.N)
            self.piece = max(1, 2**26 // self.D)
        else:
            self.small = 2**24
            self.block = max(1, 2**26 // self.N)
            self.piece = max(1, 2**17 // self.D)
        # x - centre rounds only once if the centre is a number of the precision that the difference is taken in.
        sample = self.stored(torch.arange(1))
        bits = 32 if sample.is_floating_point() else 16
        self.work = torch.float32 if 8 * sample.itemsize <= bits else torch.float64
        self.centre = self.centre.to(self.work).double()

    # ---- what one asks -----------------------------------------------------------------------------------------------

    def posterior_mean_and_bound(self, z, t, y=None):
        """Return x_* (B, *shape), and a bound on the share of the weights that it leaves out (B,)."""
        z64, t64 = self.queries(z, t)
        x_star = torch.empty_like(z64)
        bound = torch.empty_like(t64[:, 0])
        for b, rows in self.groups(y, len(z)):
            x_star[b], _, bound[b] = self.softmax_and_bound(z64[b], t64[b], rows)
        x_star = x_star.view_as(z)
        return as_query(x_star, z), as_query(bound, z)

    def softmax_mean(self, z, t, rows):
        """Return x_* (B, D) and the effective number of points (B, 1), over the data points `rows`."""
        mean, size, _ = self.softmax_and_bound(z, t, rows)
        return mean, size

    def count(self, rows):
        """Return the number of data points in `rows`, or of all."""
        return self.N if rows is None else len(rows)

    # ---- the softmax -------------------------------------------------------------------------------------------------

    def softmax_and_bound(self, z, t, rows):
        """Return x_* (B, D), the effective number of points (B, 1) and the bound on the weight left out (B,)."""
        # where screening costs more than it saves
        if len(z) * self.count(rows) * self.D < self.small:
            mean, size = super().softmax_mean(z, t, rows)
            return mean, size, torch.zeros_like(t[:, 0])
        found = self.screen(z, t, rows)
        mean, size, bound = self.softmax_of_survivors(found, t, self.count(rows))
        rest = ~found.complete
        bound[rest] = 0
        fits = self.fits_float32(z, t)
        single = rest & fits
        if single.any():
            dense = found.dense[single[found.dense_query]]
            mean[single], size[single] = self.softmax_in_float32(dense, t[single], rows)
        double = rest & ~fits
        if double.any():
            mean[double], size[double] = super().softmax_mean(z[double], t[double], rows)
        return mean, size, bound

    def softmax_of_survivors(self, found, t, count):
        """Return the same of the survivors among `count` points. Pairs lighter than TAU / N count as left out, too."""
        B = len(t)
        light = TAU / self.N
        logits = found.logits(t)
        top = largest(logits, found.query, B)
        w = (logits - top[found.query]).exp()
        heavy = w >= light
        w = w[heavy]
        query = found.query[heavy]
        point = found.point[heavy]
        total = w.new_zeros(B).index_add(0, query, w)
        squares = w.new_zeros(B).index_add(0, query, w.square())
        weighted = w.new_zeros(B, self.D)
        pieces = zip(w.split(self.piece), query.split(self.piece), point.split(self.piece), strict=True)
        for w_i, b, i in pieces:
            weighted.index_add_(0, b, w_i[:, None] * self.points(i))
        left_out = (count - torch.bincount(query, minlength=B)) * light
        mean = weighted / total[:, None]
        size = total**2 / squares
        return mean, size[:, None], left_out / total

    def fits_float32(self, z, t):
        """Say for which queries a float32 product loses less than LOSS of a logit: an estimate, not a bound. (B,)"""
        alpha = 1 - t
        radius = self.sketch.radius
        length = (z - alpha * self.centre).norm(dim=1, keepdim=True)
        logit = alpha * radius * (length + alpha * radius) / t**2
        growth = max(1, self.D / 2e5)**0.5
        loss = 2.0**-23 * growth * logit
        return (loss[:, 0] < LOSS) & (radius > TINY)

    def softmax_in_float32(self, dense, t, rows):
        """Return x_* (B, D) and the effective number of points (B, 1) from float32 distances (B, n)."""
        nearest = dense.amin(1, keepdim=True)
        factor = -1 / (2 * t**2)
        factor = factor.float()
        total = 0
        squares = 0
        weighted = 0
        with exact_float32(self.device):
            for columns, points in self.float32_chunks(rows):
                logits = (dense[:, columns] - nearest) * factor                     # (B, n)
                w = logits.exp_()
                total = total + w.sum(1, keepdim=True).double()
                squares = squares + w.square().sum(1, keepdim=True).double()
                weighted = weighted + (w @ points).double()
        mean = weighted / total + self.centre
        return mean, total**2 / squares

    # ---- screening ---------------------------------------------------------------------------------------------------

    def screen(self, z, t, rows):
        """Return the Survivors: all points of `rows` that weigh more than TAU / N of the heaviest."""
        alpha = 1 - t
        q = z - alpha * self.centre
        limit = FEW + SHARE * self.count(rows)
        slack = 2 * t[:, 0].square() * math.log(self.N / TAU)
        everyone = torch.arange(len(z), device=self.device)
        if rows is None:
            point_of = torch.arange(self.N, device=self.device)
        else:
            point_of = rows.to(self.device)
        with exact_float32(self.device):
            lower, slip = self.bounds_of_sketch(q, alpha, rows)
            # No point that survives is farther than the likeliest one and the slack.
            likely = point_of[lower.min(1).indices]
            nearest = self.exact_d2(z, t, everyone, likely)
            high = nearest + slack - q.square().sum(1)
            query, column, complete = strike(lower, high + slip, limit)
            (rest,) = torch.where(~complete)
            dense, slip = self.bounds_of_points(q[rest], alpha[rest], rows)
            fits = self.fits_float32(z[rest], t[rest])
            limit = torch.where(fits, limit, MORE * limit)
            more, more_columns, done = strike(dense, high[rest] + slip, limit)
        complete[rest] = done
        query = torch.cat([query, rest[more]])
        point = point_of[torch.cat([column, more_columns])]
        d2 = self.exact_d2(z, t, query, point)
        return Survivors(query, point, d2, complete, rest, dense)

    def exact_d2(self, z, t, query, point):
        """Return |z - (1 - t) x|^2 of pairs, by differences in float64: (P,)."""
        d2 = [z.new_zeros(0)]
        pieces = zip(query.split(self.piece), point.split(self.piece), strict=True)
        for b, i in pieces:
            # In place: this is where most of the time goes.
            difference = self.points(i).mul_(t[b] - 1).add_(z.index_select(0, b))
            d2.append(difference.norm(dim=1).square())
        return torch.cat(d2)

    def bounds_of_sketch(self, q, alpha, rows):
        """Return bounds (B, n) below |q - alpha x|^2 - |q|^2, but for a slip (B,), for q = z - alpha centre (B, D).

        Let u = 2 alpha q, and let u~ and x~ be the parts of u and x that V does not see. Cauchy and Schwarz say that

            |q - alpha x|^2 - |q|^2 = alpha^2 |x|^2 - u.x >= alpha^2 |x|^2 - (V^T u).(V^T x) - |u~| |x~|
        """
        sketch = self.sketch
        u = 2 * alpha * q
        along = u @ sketch.V
        beyond = u - along @ sketch.V.T
        length = beyond.norm(dim=1, keepdim=True)
        side = torch.cat([-along, -length, alpha**2], 1)                            # (B, k + 2)
        points = sketch.points
        if rows is not None:
            points = points[rows.to(self.device)]
        bounds = side.float() @ points.T                                            # (B, n)
        return bounds, self.slip(q, alpha, side.shape[1])

    def bounds_of_points(self, q, alpha, rows):
        """Return the same along all directions, where it is |q - alpha x|^2 - |q|^2 itself."""
        squares = self.sketch.points[:, -1]
        if rows is not None:
            squares = squares[rows.to(self.device)]
        bounds = alpha.square().float() * squares                                   # (B, n)
        u = (2 * alpha * q).float()
        for columns, points in self.float32_chunks(rows):
            bounds[:, columns].addmm_(u, points.T, alpha=-1)
        return bounds, self.slip(q, alpha, self.D)

    def slip(self, q, alpha, k):
        """Return a bound on what rounding changes in a sum of k float32 products, and in float64: (B,).

        The products add up to (|q| + alpha |x|)^2 at most. Each of k sums loses 2^-24 of that. We allow for twice as
        much, and for 20 more, since all factors are rounded. float64 loses digits if the centre is far from 0. TINY
        covers underflow.
        """
        length = q.norm(dim=1)
        radius = self.sketch.radius
        centre = 2.0**-48 * self.centre.norm()
        reach = length + alpha[:, 0] * radius
        in_float32 = (k + 20) * 2.0**-23 * reach.square()
        return in_float32 + centre * (length + radius + centre) + TINY

    # ---- the data, as screening reads them ---------------------------------------------------------------------------

    @functools.cached_property
    def sketch(self):
        """The Sketch along an eighth of the directions. The bounds hold for any orthonormal V."""
        k = max(1, min(self.D // 8, self.N // 32, 512))
        V = self.principal_directions(k)
        rows = torch.empty(self.N, V.shape[1] + 2, device=self.device)
        for index, points in self.chunks():
            points = points - self.centre
            c = points @ V                                                          # (n, k)
            square = points.square().sum(1, keepdim=True)
            seen = c.square().sum(1, keepdim=True)
            rest = (square - seen).clamp(min=0)
            # What float64 may lose of the difference.
            rest = rest + (self.D + 64) * 2.0**-50 * square
            rows[index] = torch.cat([c, rest.sqrt(), square], 1).float()
        radius = rows[:, -1].max().sqrt().item()
        return Sketch(V, rows, radius if radius < HUGE else math.inf)

    def principal_directions(self, k):
        """Return k orthonormal directions (D, k) in which points vary most, by subspace iteration over some points."""
        count = min(self.N, max(1024, 4 * k))
        sample = torch.linspace(0, self.N - 1, count).long()
        points = self.points(sample) - self.centre
        generator = torch.Generator().manual_seed(0)
        V = torch.randn(self.D, k, generator=generator, dtype=torch.float64).to(self.device)
        for _ in range(3):
            V = torch.linalg.qr(points.T @ (points @ V)).Q
        return V

    def float32_chunks(self, rows):
        """Yield (columns, points (n, D) about the centre, in float32) chunk by chunk, of `rows` or of all data."""
        if rows is None:
            rows = torch.arange(self.N)
        centre = self.centre.to(self.work)
        for start in range(0, len(rows), self.chunk):
            columns = slice(start, start + self.chunk)
            points = self.stored(rows[columns]).to(self.work)
            yield columns, points.sub_(centre).float()

    def points(self, rows):
        """Return the data points `rows` (n,) as float64 (n, D), in memory of their own."""
        return self.stored(rows).double()

    def stored(self, rows):
        """Return the data points `rows` (n,) as they are stored, (n, D)."""
        if torch.is_tensor(self.x):
            points = self.x.index_select(0, rows.to(self.x.device))
        else:
            points = torch.from_numpy(self.x[rows.cpu().numpy()])
        return points.flatten(1).to(self.device)

    def groups(self, y, B):
        """Yield (queries (b,), rows) as EmpiricalScore does, but no more queries at once than memory holds."""
        everyone = torch.arange(B)
        for b, rows in super().groups(y, B):
            for part in everyone[b].split(self.block):
                yield part.to(self.device), rows


def make_score(data, device, fast):
    """Return the empirical score of a data set: by this engine, or by the plain one, for the same numbers."""
    kind = FastEmpiricalScore if fast else EmpiricalScore
    return kind(data["x"], data["y"], device=device)
