"""
FastEmpiricalScore: the answers of EmpiricalScore, several times as fast over many points.

At small t nearly all weights of the softmax are zero, and it takes no precision to prove it. So there are two passes.

1. Screening. A product in low precision, along an eighth of the directions, bounds every squared distance from below.
   We strike a point if it weighs less than tau / N of the heaviest even should the bound be its distance. `query_side`
   bounds what rounding and the other directions can change. So all that we strike is certain to be light.
2. The points that survive get their exact distances, by differences in float64. The softmax is over them alone.

What we strike weighs less than tau = 1e-7 of the total. `posterior_mean_and_bound` returns the bound that was reached.
If more than one point in 32 survives, a finer screening along all directions follows. If that strikes too little as
well, as at t near 1, all points count: in float32 where this costs x_* less than 1e-5, else as in EmpiricalScore.

r_star, nearest and small questions go to EmpiricalScore. tests/test_fast_score.py searches for data that break the
bounds. Needs torch 2.9.
"""
import contextlib
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from empirical_score import EmpiricalScore, as_query

# We keep this share of all pairs of a query and a point, and at most PAIRS. The queries still open divide them.
# A level gives up a query that needs more, but it always allows FEW points.
SHARE, PAIRS, FEW = 1 / 32, 2**24, 32
# Lengths from 1 / HUGE to HUGE have squares and products that float32 can hold.
HUGE = 1e15
# A logit may lose this much in float32, by the estimate in `fits_float32`. Then x_* loses 1e-5 at most, as measured.
LOSS = 5e-5


@dataclass
class Level:
    """A way to screen: the coordinates c of the points along some directions, in low precision.

    V (D, k) holds orthonormal directions, and c = low(V^T x) stays in memory. V None: all directions, and c = low(x) is
    made chunk by chunk. The columns of a point are |x|^2, a bound on |x| and on |c|, and a bound on |x - V c|, the part
    of x that the directions do not see.
    """
    dtype: torch.dtype
    columns: torch.Tensor            # (N, 3) float32
    kappa: float                     # |V^T x - c| <= kappa |x| for every point
    V: torch.Tensor | None = None    # (D, k) float64
    c: torch.Tensor | None = None    # (N, k)
    loss: float = 0.0                # what a float64 product with V loses, relative to the lengths


@dataclass
class Side:
    """What screening needs to know of the queries; see `query_side`.

    The columns of a point times `lower`, minus the product of its coordinates with `low`, are at most
    |q - alpha x|^2 - |q|^2.
    """
    low: torch.Tensor                # (B, k)  2 alpha q along the directions, in low precision
    lower: torch.Tensor              # (B, 3)
    slip: torch.Tensor               # (B,)    what underflow and float64 can change
    qq: torch.Tensor                 # (B,)    |q|^2

    def take(self, queries):
        """Return the side of some of the queries."""
        return Side(*(value[queries] for value in vars(self).values()))


@dataclass
class Survivors:
    """Pairs of a query and a point that may matter to it. For a complete query, all other points are certain not to."""
    query: torch.Tensor              # (P,)
    point: torch.Tensor              # (P,)    row of the data
    d2: torch.Tensor                 # (P,)    |z - alpha x|^2 in float64
    complete: torch.Tensor           # (B,)    False: too many points may matter, and the query has no pairs here

    def logits(self, t):
        """Return -d2 / (2 t^2), (P,)."""
        t = t[self.query, 0]
        return -self.d2 / (2 * t**2)


@contextlib.contextmanager
def exact_float32(device):
    """Switch off, for a while, what makes float32 products less exact than float32: TF32, bfloat16, autocast."""
    cuda = torch.backends.cuda.matmul
    backends = [cuda, torch.backends.mkldnn.matmul]
    precisions = [backend.fp32_precision for backend in backends]
    reduced = cuda.allow_bf16_reduced_precision_reduction
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        cuda.allow_bf16_reduced_precision_reduction = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
        cuda.allow_bf16_reduced_precision_reduction = reduced


def low_precision(device):
    """Return bfloat16 where its products are fast and their sums come in float32: on Nvidia's GPUs. Else float32."""
    if device.type != "cuda" or torch.version.hip:
        return torch.float32
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def product(a, b):
    """Return a @ b.T in float32."""
    if a.dtype == torch.float32:
        return a @ b.T
    # Tensor cores want multiples of 8.
    missing = -len(b) % 8
    padded = torch.nn.functional.pad(b, (0, 0, 0, missing))
    out = torch.mm(a, padded.T, out_dtype=torch.float32)
    return out[:, :len(b)]


def lower_bounds(side, coordinates, columns):
    """Return lower bounds on |q - alpha x|^2 - |q|^2 for points with these coordinates and columns: (n, B)."""
    dot = product(coordinates, side.low)
    return torch.addmm(dot, columns, side.lower.T, beta=-1)


def largest(value, query, B):
    """Return the largest value of each query, -inf for a query without any: (B,)."""
    none = torch.full((B,), -torch.inf, dtype=torch.float64, device=value.device)
    return none.scatter_reduce(0, query, value, "amax")


class FastEmpiricalScore(EmpiricalScore):
    """Answer what EmpiricalScore answers, faster, and leave out points that weigh at most tau together.

    Beside the data, it keeps an eighth of them in memory, in float32, or in bfloat16 on a GPU.
    """

    def __init__(self, x, y=None, device=None, chunk=None, tau=1e-7):
        if not 0 < tau < 1:
            raise ValueError(f"tau must lie in (0, 1), not {tau}")
        super().__init__(x, y, device)
        self.tau = tau
        # `small`: the queries x points x dimensions below which EmpiricalScore is quicker.
        # `block`: queries at once; queries x chunk fit into memory. `piece`: points at once; they fit into caches.
        if self.device.type == "cuda":
            self.chunk = chunk or 2**16
            self.small = 2**34
            self.block = max(1, 2**26 // self.chunk)
            self.piece = max(1, 2**26 // self.D)
        else:
            self.chunk = chunk or 2**10
            self.small = 2**24
            self.block = max(1, 2**22 // self.chunk)
            self.piece = max(1, 2**17 // self.D)
        # x - centre rounds only once if the centre is a number of the precision that the difference is taken in.
        sample = self.read(slice(1))
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

    def sample_posterior(self, z, t, y=None, generator=None):
        """Return one row of the data per query (B,), drawn with the probabilities w_i, but for the weight left out."""
        z64, t64 = self.queries(z, t)
        draw = torch.full((len(z),), -1, device=self.device)
        for b, rows in self.groups(y, len(z)):
            found = self.survivors_of_softmax(z64[b], t64[b], rows)
            noise = torch.empty_like(found.d2, device="cpu").exponential_(generator=generator)
            value = found.logits(t64[b]) - noise.log().to(self.device)
            best = value == largest(value, found.query, len(b))[found.query]
            winner = b[found.query[best]]
            draw[winner] = found.point[best]
        rest = draw < 0
        if rest.any():
            z_rest = z[rest.to(z.device)]
            t_rest = t64[rest, 0]
            y_rest = None
            if y is not None:
                y_rest = torch.as_tensor(y).cpu()[rest.cpu()]
            drawn = super().sample_posterior(z_rest, t_rest, y_rest, generator)
            draw[rest] = drawn.to(self.device)
        return draw.to(z.device)

    # ---- what the survivors say --------------------------------------------------------------------------------------

    def survivors_of_softmax(self, z, t, rows):
        """Return all points of `rows` that weigh more than tau / N of the heaviest."""
        slack = 2 * t[:, 0].square() * math.log(self.N / self.tau)
        return self.screen(z, t, rows, slack)

    def softmax_and_bound(self, z, t, rows):
        """Return x_* (B, D), the effective number of points (B, 1) and the bound on the weight left out (B,)."""
        if not self.is_large(z, rows):
            mean, size = super().softmax_mean(z, t, rows)
            return mean, size, torch.zeros_like(t[:, 0])
        found = self.survivors_of_softmax(z, t, rows)
        count = self.N if rows is None else len(rows)
        mean, size, bound = self.softmax_of_survivors(found, t, count)
        rest = ~found.complete
        bound[rest] = 0
        single = rest & self.fits_float32(z, t)
        if single.any():
            mean[single], size[single] = self.softmax_in_float32(z[single], t[single], rows)
        double = rest & ~single
        if double.any():
            mean[double], size[double] = super().softmax_mean(z[double], t[double], rows)
        return mean, size, bound

    def softmax_of_survivors(self, found, t, count):
        """Return the same of the survivors among `count` points. Pairs lighter than tau / N count as left out, too."""
        B = len(t)
        light = self.tau / self.N
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
        q = z - alpha * self.centre
        length = q.norm(dim=1, keepdim=True)
        logit = alpha * self.radius * (length + alpha * self.radius) / t**2
        growth = max(1, self.D / 2e5)**0.5
        loss = 2.0**-23 * growth * logit
        return loss[:, 0] < LOSS

    def softmax_in_float32(self, z, t, rows):
        """Return what EmpiricalScore.softmax_mean returns, by float32 products about the centre."""
        alpha = 1 - t
        q = z - alpha * self.centre
        query = (alpha / t**2 * q).float()
        bias = (-alpha**2 / (2 * t**2)).float()                                     # (B, 1)
        top = torch.full_like(bias, -torch.inf)
        total = 0
        squares = 0
        weighted = 0
        with exact_float32(self.device):
            for _, points, columns in self.coordinates(self.levels[-1], rows):
                dot = product(query, points)
                logits = torch.addcmul(dot, bias, columns[:, 0])                    # (B, n)
                chunk_top = logits.amax(1, keepdim=True)
                new_top = torch.maximum(top, chunk_top)
                shrink = (top - new_top).exp().double()
                w = logits.sub_(new_top).exp_()
                total = shrink * total + w.sum(1, keepdim=True)
                squares = shrink**2 * squares + w.square().sum(1, keepdim=True)
                weighted = shrink * weighted + w @ points
                top = new_top
        mean = weighted / total + self.centre
        return mean, total**2 / squares

    # ---- screening ---------------------------------------------------------------------------------------------------

    def is_large(self, z, rows):
        """Say whether screening pays, and whether its float32 numbers can hold the data."""
        count = self.N if rows is None else len(rows)
        work = len(z) * count * self.D
        return work > self.small and len(self.levels) > 0

    def screen(self, z, t, rows, slack):
        """Return the Survivors: the points of `rows` whose d^2 = |z - alpha x|^2 is within `slack` of the smallest."""
        alpha = 1 - t
        q = z - alpha * self.centre
        high = torch.full_like(slack, torch.inf)
        complete = torch.zeros_like(slack, dtype=torch.bool)
        (ask,) = torch.where(q.norm(dim=1) < HUGE)
        queries, points = [ask[:0]], [ask[:0]]
        levels = self.levels if self.is_large(z, rows) else []
        pairs = min(PAIRS, SHARE * len(z) * (self.N if rows is None else len(rows)))
        with exact_float32(self.device):
            for number, level in enumerate(levels):
                side = self.query_side(q[ask], alpha[ask], level)
                if number == 0:
                    # No point that survives is farther than the likeliest one and the slack.
                    likely = self.search(side, level, rows)
                    high[ask] = self.exact_d2(z, t, ask, likely) + slack[ask]
                limit = max(FEW, pairs / max(1, len(ask)))
                query, point, done = self.collect(side, level, rows, high[ask], limit)
                queries.append(ask[query])
                points.append(point)
                complete[ask[done]] = True
                ask = ask[~done]
        query = torch.cat(queries)
        point = torch.cat(points)
        d2 = self.exact_d2(z, t, query, point)
        return Survivors(query, point, d2, complete)

    def search(self, side, level, rows):
        """Return the point with the least lower bound, (B,)."""
        least = torch.full_like(side.qq, torch.inf).float()
        likely = torch.zeros_like(side.qq, dtype=torch.long)
        for index, coordinates, columns in self.coordinates(level, rows):
            bounds = lower_bounds(side, coordinates, columns)                       # (n, B)
            here, place = bounds.min(0)
            likely = torch.where(here < least, index[place], likely)
            least = torch.minimum(here, least)
        return likely

    def collect(self, side, level, rows, high, limit):
        """Return (query (P,), point (P,), complete (B,)): all pairs whose lower bound is at most `high` (B,).

        We give up a query with more than `limit` of them: it is not complete, and returns none.
        """
        # The bounds are relative to |q|^2. float64 has rounded d^2, and float32 rounds the limit.
        slip = 2.0**-40 * (high + side.qq) + side.slip
        high = high - side.qq + slip
        high = (high + 2.0**-22 * high.abs()).float()
        live = torch.arange(len(high), device=self.device)
        complete = torch.zeros_like(live, dtype=torch.bool)
        seen = torch.zeros_like(live)
        queries, points = [live[:0]], [live[:0]]
        for index, coordinates, columns in self.coordinates(level, rows):
            bounds = lower_bounds(side, coordinates, columns)                       # (n, B)
            hit = bounds <= high
            seen = seen + hit.sum(0)
            few = seen <= limit
            if not few.all():
                side = side.take(few)
                hit = hit[:, few]
                live = live[few]
                seen = seen[few]
                high = high[few]
            if len(live) == 0:
                break
            place, query = hit.nonzero(as_tuple=True)
            queries.append(live[query])
            points.append(index[place])
        complete[live] = True
        query = torch.cat(queries)
        point = torch.cat(points)
        keep = complete[query]
        return query[keep], point[keep], complete

    def exact_d2(self, z, t, query, point):
        """Return |z - (1 - t) x|^2 of pairs, by differences in float64: (P,)."""
        d2 = [z.new_zeros(0)]
        pieces = zip(query.split(self.piece), point.split(self.piece), strict=True)
        for b, i in pieces:
            # In place: this is where most of the time goes.
            difference = self.points(i).mul_(t[b] - 1).add_(z.index_select(0, b))
            d2.append(difference.norm(dim=1).square())
        return torch.cat(d2)

    def query_side(self, q, alpha, level):
        """Return what the bounds need of the queries q = z - alpha centre, (B, D) in float64; alpha (B, 1).

        |q - alpha x|^2 = |q|^2 + alpha^2 |x|^2 - u.x, where u = 2 alpha q, and x is relative to the centre. Let a =
        low(V^T u), and let u~ and x~ be the parts of u and x that V does not see. The product a.c misses u.x by at most

            |u~| |x~| + kappa |V^T u| |x|       by Cauchy and Schwarz, beyond the directions and along them
            + |a - V^T u| |c|                   because we round the query
            + (k + 20) 2^-23 |a| |c|            because we add k products in float32: twice what this can lose
        """
        u = 2 * alpha * q
        inside = u
        outside = torch.zeros_like(u)
        if level.V is not None:
            inside = u @ level.V
            outside = u - inside @ level.V.T
        low = inside.to(level.dtype)
        a = low.double()
        k = low.shape[1]
        length = u.norm(dim=1)
        qq = q.square().sum(1)
        at_c = (a - inside).norm(dim=1) + (k + 20) * 2.0**-23 * a.norm(dim=1)
        at_x = at_c + level.kappa * inside.norm(dim=1) + level.loss * length
        at_beyond = outside.norm(dim=1) + level.loss * length
        # We compute the bounds in float32, too. The factors allow for that.
        a2 = alpha[:, 0].square()
        shorter = 1 - 2.0**-20
        wider = 1 + 2.0**-18
        lower = torch.stack([shorter * a2, -wider * at_x, -wider * at_beyond], 1)
        underflow = k * 2.0**-122 * (1 + length + self.radius)
        centring = 2.0**-50 * self.centre.norm() * (qq.sqrt() + self.radius)
        return Side(low, lower.float(), underflow + centring, qq)

    # ---- the data, as screening reads them ---------------------------------------------------------------------------

    @functools.cached_property
    def squares(self):
        """The |x - centre|^2 of all points, (N,) float64."""
        squares = []
        for _, points in self.chunks():
            points = points - self.centre
            squares.append(points.square().sum(1))
        return torch.cat(squares)

    @functools.cached_property
    def radius(self):
        """The largest |x - centre|."""
        return self.squares.max().sqrt().item()

    @functools.cached_property
    def levels(self):
        """The ways to screen, the cheapest first; none if float32 cannot hold the data.

        The last one comes twice: the few queries that it leaves may have more points each at the second time.
        """
        if not 1 / HUGE < self.radius < HUGE:
            return []
        low = low_precision(self.device)
        length = self.squares.sqrt() * (1 + 2.0**-7)
        columns = torch.stack([self.squares, length, 0 * length], 1).float()
        finest = Level(torch.float32, columns, kappa=2.0**-23)
        levels = [finest, finest]
        if low == torch.bfloat16:
            levels.insert(0, Level(low, columns, kappa=1.02 * 2.0**-8))
        k = min(self.D // 8, self.N // 32, 512) // 16 * 16
        if k > 0:
            levels.insert(0, self.principal_level(k, low))
        return levels

    def principal_level(self, k, dtype):
        """Return the Level of k directions in which the points vary most, or nearly so. The bounds hold for any."""
        V = self.principal_directions(k)
        loss = (self.D + 64) * k**0.5 * 2.0**-50
        # V is not quite orthonormal.
        identity = torch.eye(k, dtype=torch.float64, device=self.device)
        skew = (V.T @ V - identity).norm() + loss
        c = torch.empty(self.N, k, dtype=dtype, device=self.device)
        columns = torch.empty(self.N, 3, device=self.device)
        kappa = 0.0
        for index, points in self.chunks():
            inside = (points - self.centre) @ V                                     # (n, k)
            low = inside.to(dtype)
            c[index] = low
            low = low.double()
            size = low.norm(dim=1)
            square = self.squares[index]
            length = square.sqrt()
            # |x - V c|^2 = |x|^2 - 2 c.V^T x + |V c|^2
            rest = square - 2 * (low * inside).sum(1) + (1 + skew) * size**2
            rest = rest + loss * (square + size**2)
            beyond = rest.clamp(min=0).sqrt() * (1 + 2.0**-20)
            error = (inside - low).norm(dim=1) + skew * size + loss * length
            ratio = error / length.clamp(min=1e-150)
            kappa = max(kappa, ratio.max().item())
            columns[index] = torch.stack([square, length, beyond], 1).float()
        columns[:, 1] *= 1 + max(2.0**-7, 1.01 * kappa)
        return Level(dtype, columns, kappa, V, c, loss)

    def principal_directions(self, k):
        """Return orthonormal directions (D, k), by subspace iteration over some of the points."""
        count = min(self.N, max(1024, 4 * k))
        sample = torch.linspace(0, self.N - 1, count).long()
        points = (self.points(sample) - self.centre) / self.radius
        generator = torch.Generator().manual_seed(0)
        V = torch.randn(self.D, k, generator=generator, dtype=torch.float64).to(self.device)
        for _ in range(3):
            V = torch.linalg.qr(points.T @ (points @ V)).Q
        return V

    def coordinates(self, level, rows):
        """Yield (row numbers (n,), coordinates (n, k), columns (n, 3)) chunk by chunk, of `rows` or of all data."""
        if rows is None:
            everything = torch.arange(self.N, device=self.device)
        else:
            everything = rows.to(self.device)
        for start in range(0, len(everything), self.chunk):
            stop = start + self.chunk
            index = everything[start:stop]
            # A slice is read faster than row numbers.
            where = slice(start, stop) if rows is None else index
            if level.c is None:
                c = self.low_points(where, level.dtype)
            else:
                c = level.c[where]
            yield index, c, level.columns[where]

    def low_points(self, where, dtype):
        """Return the points at a slice or at row numbers, relative to the centre and in low precision: (n, D)."""
        points = self.read(where).flatten(1)
        points = points.to(self.device).to(self.work)
        centre = self.centre.to(self.work)
        return (points - centre).to(dtype)

    def points(self, rows):
        """Return the data points `rows` (n,) as float64 (n, D), in memory of their own."""
        points = self.read(rows).flatten(1)
        return points.to(self.device).double()

    def read(self, where):
        """Return the points at a slice or at row numbers, as they are stored."""
        if torch.is_tensor(self.x):
            if isinstance(where, slice):
                return self.x[where]
            return self.x.index_select(0, where.to(self.x.device))
        if torch.is_tensor(where):
            where = where.cpu().numpy()
        return torch.from_numpy(np.array(self.x[where]))

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
