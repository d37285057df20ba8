"""
FastEmpiricalScore: the answers of EmpiricalScore, several times as fast over many points where t is small.

At small t nearly all weights of the softmax are zero, and it takes no float64 to prove it.

1. One float32 product gives all squared distances. The `slip` bounds what rounding changes in them.
2. We strike a point if it weighs less than TAU / N of the heaviest, even after the slip is taken off its distance.
3. EmpiricalScore answers, in float64, for the points that are left.

What we strike weighs less than TAU of the total. `posterior_mean_and_bound` returns the bound that was reached.
Near t = 1 all points count. We strike none there, and are no faster than EmpiricalScore.

r_star, nearest and draws are those of EmpiricalScore. tests/test_fast_score.py searches for data that break the bound.
"""
import contextlib
import dataclasses
import math

import torch

from empirical_score import EmpiricalScore, as_query

TAU = 1e-7
# This many queries share one call of EmpiricalScore, over all points that at least one of them needs: at most N points
# if each needs N / TOGETHER. For queries that need more, whose weights are spread, all points count.
TOGETHER = 32
# This many points at once are multiplied in float32: they fit into a CPU's caches.
PIECE = 1024
# float32 cannot hold the squares of lengths far below TINY or far above HUGE.
TINY, HUGE = 1e-15, 1e15


@contextlib.contextmanager
def exact_float32(device):
    """Switch off, for a while, what makes float32 products less exact than float32: TF32, bfloat16, autocast."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclasses.dataclass
class Survivors:
    """What is not struck: the points that may weigh more than TAU / N of the heaviest."""
    rows: torch.Tensor  # (n,), of all points that were compared
    kept: torch.Tensor  # (B, n), true where a query may need a point

    def needed_by(self, queries):
        """Return the rows of the points that at least one of the queries (b,) may need."""
        return self.rows[self.kept[queries].any(0).cpu()]


class FastEmpiricalScore(EmpiricalScore):
    """Answer what EmpiricalScore answers, faster, and leave out points that weigh at most TAU together."""

    def __init__(self, x, y=None, device=None, chunk=4096):
        super().__init__(x, y, device, chunk)
        self.centre32 = self.centre.float()
        on_gpu = self.device.type == "cuda"
        # For fewer points x dimensions than this, EmpiricalScore is quicker.
        self.small = 2**27 if on_gpu else 2**20
        # This many queries go at once: a float32 matrix (block, N) must fit into memory.
        self.block = max(1, (2**30 if on_gpu else 2**27) // self.N)

    def posterior_mean_and_bound(self, z, t, y=None):
        """Return x_* (B, *shape), and a bound on the share of the weights that it leaves out (B,)."""
        z64, t64 = self.queries(z, t)
        x_star = torch.empty_like(z64)
        bound = torch.empty_like(t64[:, 0])
        for b, rows in self.groups(y, len(z)):
            x_star[b], _, bound[b] = self.softmax_and_bound(z64[b], t64[b], rows)
        return as_query(x_star.view_as(z), z), as_query(bound, z)

    def softmax_mean(self, z, t, rows):
        """Return x_* (B, D) and the effective number of points (B, 1), over the data points `rows`."""
        return self.softmax_and_bound(z, t, rows)[:2]

    def softmax_and_bound(self, z, t, rows):
        """Return x_* (B, D), the effective number of points (B, 1) and the bound on the weight left out (B,)."""
        everyone = torch.arange(self.N) if rows is None else rows
        bound = torch.zeros_like(t[:, 0])
        if len(everyone) * self.D < self.small:
            return *super().softmax_mean(z, t, rows), bound
        mean = torch.empty_like(z)
        size = torch.empty_like(t)
        survivors = self.screen(z, t, everyone)
        spread = survivors.kept.sum(1) > len(everyone) / TOGETHER
        if spread.any():
            mean[spread], size[spread] = super().softmax_mean(z[spread], t[spread], rows)
        (few,) = torch.where(~spread)
        for b in few.split(TOGETHER) if len(few) else ():
            needed = survivors.needed_by(b)
            mean[b], size[b] = super().softmax_mean(z[b], t[b], needed)
            bound[b] = (len(everyone) - len(needed)) * TAU / self.N
        return mean, size, bound

    def screen(self, z, t, rows):
        """Return the Survivors among the points `rows`, for each query."""
        alpha = 1 - t
        q = z - alpha * self.centre32.double()
        d2, slip = self.float32_distances(q, alpha, rows)
        # We compare with the point that seems nearest, and take its distance in float64.
        likely = rows[d2.argmin(1).cpu()]
        nearest = (z - alpha * self.points(likely)).square().sum(1, keepdim=True)
        slack = 2 * t.square() * math.log(self.N / TAU)
        limit = nearest + slack + slip - q.square().sum(1, keepdim=True)
        # In float32 the limit must not be smaller.
        limit = (limit + 2.0**-22 * limit.abs()).float()
        # What has overflowed to nan is not struck.
        return Survivors(rows, ~(d2 > limit))

    def float32_distances(self, q, alpha, rows):
        """Return |q - alpha x|^2 - |q|^2 in float32 (B, n), and its slip (B, 1), for x about the centre.

        It is alpha^2 |x|^2 - 2 alpha q.x. The products add up to (|q| + alpha |x|)^2 at most. Each of D sums loses
        2^-24 of that. We allow for twice as much, and for 20 more sums, since all factors are rounded. The last term of
        `reach` is for what float64 loses if the centre is far from 0.
        """
        u = (-2 * alpha * q).float()
        alpha2 = alpha.square().float()
        d2 = torch.empty(len(q), len(rows), device=self.device)
        radius = torch.zeros(1, device=self.device)
        with exact_float32(self.device):
            for piece, index in zip(d2.split(PIECE, 1), rows.split(PIECE), strict=True):
                points = self.float32_points(index)
                lengths = points.norm(dim=1)
                torch.addmm(alpha2 * lengths.square(), u, points.T, out=piece)
                radius = torch.maximum(radius, lengths.max())
        reach = q.norm(dim=1, keepdim=True) + alpha * radius + 2.0**-30 * self.centre.norm()
        slip = (self.D + 20) * 2.0**-23 * reach.square()
        fits = (reach > TINY) & (reach < HUGE)
        return d2, torch.where(fits, slip, torch.inf)

    def float32_points(self, rows):
        """Return the data points `rows` (n,) less the centre, rounded once to float32: (n, D)."""
        points = torch.as_tensor(self.x[rows.numpy()])
        points = points.flatten(1).to(self.device)
        # float32 holds all numbers of these types. The others need float64 until the centre is subtracted.
        narrow = points.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
        points = points.float() if narrow else points.double()
        points -= self.centre32
        return points.float()

    def groups(self, y, B):
        """Yield (queries (b,), rows) as EmpiricalScore does, but no more queries at once than memory holds."""
        for b, rows in super().groups(y, B):
            for part in torch.arange(B)[b].split(self.block):
                yield part.to(self.device), rows


def make_score(data, device, fast):
    """Return the empirical score of a data set: by this engine, or by the plain one, for the same numbers."""
    kind = FastEmpiricalScore if fast else EmpiricalScore
    return kind(data["x"], data["y"], device=device)


class FaissScore(EmpiricalScore):
    """Draw from the posterior, and find nearest points, among `neighbours` points that Faiss finds for each query.

    Posterior means are still over all points. Raise ImportError without the package faiss.
    """
    def __init__(self, x, y=None, neighbours=200):
        super().__init__(x, y)
        try:
            import faiss
        except ImportError:
            raise ImportError("target faiss needs the package faiss: pip install faiss-cpu") from None
        self.faiss, self.neighbours = faiss, neighbours

    def candidates(self, z, t, rows):
        """Return the rows of the points that weigh most for queries z (B, D), t (B, 1), and their distances: (B, k)."""
        # They have the largest z.x_i - alpha |x_i|^2 / 2. We search by this inner product, of (z, alpha) with
        # (x_i, -|x_i|^2 / 2): a search by distance needs z / alpha, which overflows near t = 1.
        points = self.points(rows) - self.centre
        keys = torch.cat([points, -points.square().sum(1, keepdim=True) / 2], dim=1).float().cpu().numpy()
        query = torch.cat([z - (1 - t) * self.centre, 1 - t], dim=1).float().cpu().numpy()
        k = min(self.neighbours, len(rows))
        _, index = self.faiss.knn(query, keys, k, self.faiss.METRIC_INNER_PRODUCT)
        near = rows[torch.from_numpy(index)]                                        # (B, k)
        points = self.points(near.flatten()).view(*near.shape, self.D)
        return near.to(self.device), (z[:, None] - (1 - t)[:, None] * points).norm(dim=2)

    def best_points(self, value, z, t, rows=None, k=1):
        """As EmpiricalScore.best_points, among the candidates."""
        near, distances = self.candidates(z, t, torch.arange(self.N) if rows is None else rows)
        best, column = value(distances, t).topk(k)
        return best, near.gather(1, column)
