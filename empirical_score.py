"""The exact empirical score: what denoising score matching asks a network to learn (Section 2 of arXiv:2510.01378).

Training picks one of N data points x_i at random, draws eps ~ N(0, I), and shows the network z = (1 - t) x_i + t eps.
Given z alone, x_i can be any of them. The noise is Gaussian, so Bayes' rule gives the probability of each:

    w_i(z, t) = softmax_i( -|z - (1 - t) x_i|^2 / (2 t^2) )         the posterior weight of data point i
    x_*(z, t) = sum_i w_i x_i                                       the posterior mean, the best guess of the clean x

The score grad_z log p_t(z) and the velocity E[eps - x_i | z] that minimise the training loss follow from x_*:
    s_*(z, t) = ((1 - t) x_* - z) / t^2                             the empirical score, Eq. (2)
    v_*(z, t) = (z - x_*) / t                                       the empirical velocity

x_* is attention: z is the query, the data are the keys and the values. `softmax_mean` computes it as flash attention
does: the data pass by in chunks, and we keep a running maximum, sum and weighted sum for each query. We compute in
float64: at t = .001 the logits reach 1e7, and float32 rounds such numbers to whole units.
"""
import torch


class EmpiricalScore:
    """Answer exact questions about the noisy versions of N data points.
    x (N, *shape): tensor, array or memory map, read `chunk` points at a time and never copied whole. y (N,): labels.
    Queries: z (B, *shape), t a number or (B,) in (0, 1], y (B,) or None. With y, a query uses data of its class.
    Results are on the device of z, have its dtype (rows: int64), and no gradient. Bad z, t or y raise ValueError.
    """

    def __init__(self, x, y=None, device=None, chunk=4096):
        self.x = x
        labels = [] if y is None else y.tolist()
        self.y = torch.tensor(labels)
        self.N = len(x)
        if self.N == 0 or len(self.y) not in (0, self.N):
            raise ValueError(f"the data must be N >= 1 points and N labels or none, not {self.N} and {len(self.y)}")
        self.shape = tuple(x.shape[1:])
        self.chunk = chunk
        self.device = torch.device(device or x.device)
        if self.device.type == "mps":
            self.device = torch.device("cpu")                                       # MPS has no float64
        total = 0
        for _, points in self.chunks():
            total = total + points.sum(0)
        self.centre = total / self.N                                                # (D,), D numbers make a point
        self.D = len(self.centre)

    def softmax_mean(self, z, t, rows):
        """Return x_* (B, D) and the effective number of points 1 / sum_i w_i^2 (B, 1) of the data points `rows`."""
        # We divide each exp(logit) by exp(top), where top is the largest logit so far, so that nothing overflows.
        # When a chunk has a larger logit, top grows by some g, and what we have summed so far shrinks by exp(-g).
        top = torch.full_like(t, -torch.inf)                                        # (B, 1)
        total = squares = weighted = 0
        for _, points in self.chunks(rows):
            distances = self.distances(z, t, points)                                # (B, n), n points in a chunk
            logits = -(distances / t).square() / 2
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            shrink = (top - new_top).exp()
            w = (logits - new_top).exp()
            total = shrink * total + w.sum(1, keepdim=True)
            squares = shrink**2 * squares + w.square().sum(1, keepdim=True)
            weighted = shrink * weighted + w @ points                               # (B, D)
            top = new_top
        return weighted / total, total**2 / squares

    def distances(self, z, t, points):
        """Return |z - (1 - t) x_i| (B, n) as alpha |z / alpha - x_i|, alpha = 1 - t: one cdist serves every t."""
        # At t = 1 we cannot divide by alpha. An alpha of 1e-12 instead changes no distance by more than 1e-12 |x_i|.
        alpha = (1 - t).clamp(min=1e-12)
        # cdist expands |a - b|^2, which loses digits far from the origin. We move the origin to the data's mean.
        z = z / alpha - self.centre
        points = points - self.centre
        return alpha * torch.cdist(z, points)

    def in_float64(self, z, t, y):
        """Return z (B, D), t (B, 1), x_* (B, D) and the effective number of points (B, 1), all float64."""
        z64, t64 = self.queries(z, t)
        x_star = torch.empty_like(z64)
        size = torch.empty_like(t64)
        for b, rows in self.groups(y, len(z)):
            x_star[b], size[b] = self.softmax_mean(z64[b], t64[b], rows)
        return z64, t64, x_star, size

    def mean_and_size(self, z, t, y=None):
        """Return x_*(z, t) (B, *shape) and the effective number of points (B,): 1 if one has all the weight."""
        _, _, x_star, size = self.in_float64(z, t, y)
        x_star = x_star.view_as(z)
        size = size.flatten()
        return as_query(x_star, z), as_query(size, z)

    def posterior_mean(self, z, t, y=None):
        """Return x_*(z, t), (B, *shape)."""
        return self.mean_and_size(z, t, y)[0]

    def score(self, z, t, y=None):
        """Return s_*(z, t), the gradient at z of log p_t, the density of z (of class y), (B, *shape).  Eq. (2)"""
        z64, t64, x_star, _ = self.in_float64(z, t, y)
        s_star = ((1 - t64) * x_star - z64) / t64**2
        return as_query(s_star.view_as(z), z)

    def velocity(self, z, t, y=None):
        """Return v_*(z, t), (B, *shape)."""
        z64, t64, x_star, _ = self.in_float64(z, t, y)
        v_star = (z64 - x_star) / t64
        return as_query(v_star.view_as(z), z)

    def sample_posterior(self, z, t, y=None, generator=None):
        """Return the row of one data point per query (B,), drawn with the probabilities w_i. generator: on the CPU."""
        # Gumbel's trick: with independent Gumbel noise g_i, the i with the largest logit_i + g_i is such a draw.
        def noisy_logits(distances, t):
            noise = torch.empty_like(distances, device="cpu").exponential_(generator=generator)
            gumbel = -noise.log().to(self.device)  # minus log of an exponential variable, rate 1
            logits = -(distances / t).square() / 2
            return logits + gumbel
        z64, t64 = self.queries(z, t)
        draw = torch.zeros_like(t64).long()
        for b, rows in self.groups(y, len(z)):
            _, draw[b] = self.best_points(noisy_logits, z64[b], t64[b], rows)
        return draw.flatten().to(z.device)

    def r_star(self, z, t):
        """Return the r_i = |z - (1 - t) x_i| / (t sqrt D) closest to 1 over all data, and its i, both (B,).  Eq. (4)"""
        def closeness(distances, t):
            r = distances / (t * self.D**0.5)  # near 1 for the x_i that z was made from, as |eps| is near sqrt(D)
            return -(r - 1).abs()  # on which side of 1 it is, we find below
        z64, t64 = self.queries(z, t)
        _, index = self.best_points(closeness, z64, t64)
        index = index.flatten()
        difference = z64 - (1 - t64) * self.points(index)
        r = (difference / t64).norm(dim=1) / self.D**0.5
        return as_query(r, z), index.to(z.device)

    def nearest(self, x, k=1):
        """Return the squared distances of x (B, *shape) to its k nearest points, ascending, and their rows: (B, k)."""
        def nearness(distances, t):
            return -distances
        if k > self.N:
            raise ValueError(f"k must be at most {self.N}, the number of data points")
        x64, t64 = self.queries(x, 1.0)  # queries() refuses t = 0, which we want here: pass 1, and make it 0
        no_noise = 0 * t64
        value, index = self.best_points(nearness, x64, no_noise, k=k)
        return as_query(value.square(), x), index.to(x.device)

    def best_points(self, value, z, t, rows=None, k=1):
        """Return the k largest value(distances, t), in descending order, and the rows of these data points: (B, k)."""
        values = []
        indices = []
        for index, points in self.chunks(rows):
            distances = self.distances(z, t, points)                                # (B, n)
            best, column = value(distances, t).topk(min(k, len(index)))
            values.append(best)
            indices.append(index[column])
        best, order = torch.cat(values, 1).topk(k)
        index = torch.cat(indices, 1)
        return best, index.gather(1, order)

    def chunks(self, rows=None):
        """Yield (row numbers (n,), data points (n, D)) chunk by chunk, of `rows` or of all data."""
        if rows is None:
            rows = torch.arange(self.N)
        for index in rows.split(self.chunk):
            yield index.to(self.device), self.points(index)

    def points(self, rows):
        """Return the data points `rows` (n,) as float64 (n, D)."""
        points = torch.as_tensor(self.x[rows.cpu().numpy()]).detach()  # a memory map takes NumPy's indices
        points = points.flatten(1).to(self.device)
        return points.double()

    def queries(self, z, t):
        """Return z (B, D) and t (B, 1) as float64, after checking them."""
        if z.shape[1:] != self.shape or not z.is_floating_point() or not z.isfinite().all():
            raise ValueError(f"z must hold finite floating-point numbers of shape (B, *{self.shape}), not {z.shape}")
        if not torch.is_tensor(t):
            t = torch.tensor(t, dtype=torch.float64)
        in_range = (t > 0) & (t <= 1)
        if t.shape not in ((), (len(z),)) or not in_range.all():
            raise ValueError(f"t must be one number or {len(z)} in (0, 1], not {t.tolist()}")
        z = z.detach().flatten(1).to(self.device)
        t = t.detach().expand(len(z)).to(self.device)
        return z.double(), t.double()[:, None]

    def groups(self, y, B):
        """Yield (which queries, rows): the queries of a class, and its data points. Without y: all, None for all."""
        if y is None:
            yield slice(B), None
            return
        y = torch.as_tensor(y).cpu()
        if len(y) != B:
            raise ValueError(f"there are {B} queries, but {len(y)} labels")
        for label in y.unique():
            (rows,) = torch.where(self.y == label)
            if len(rows) == 0:
                raise ValueError(f"no data point has label {label}")
            yield y == label, rows


def as_query(result, z):
    """Return a float64 result in the dtype and on the device of the query z."""
    rounded = result.to(z.dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"the answer is nan or too large for {z.dtype}: pass z.double(), or a larger t")
    return rounded.to(z.device)
