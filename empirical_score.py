"""
The exact empirical score: the function that training asks a diffusion model to learn (Section 2 of the paper).

Train on D = {x_1 .. x_N} with z_t = alpha_t x + sigma_t eps, alpha_t = 1 - t, sigma_t = t. The noisy training points
are a mixture of N Gaussians,  p_t(z) = 1/N sum_i N(z; alpha_t x_i, sigma_t^2 I),  and the minimiser of the training
loss (Eq. 1) is known in closed form. It needs the posterior over which point a given z came from, a softmax,

    w_i(z, t) = softmax_i( -|z - alpha_t x_i|^2 / 2 sigma_t^2 ),      x_*(z, t) = sum_i w_i x_i      the posterior mean

and everything else is linear in x_*:

    s_* = (alpha_t x_* - z) / sigma_t^2     the empirical score, Eq. (2)      v_* = (z - x_*) / t       the velocity

    E = EmpiricalScore(x, y)                # x (N, *shape), a tensor or a memory-mapped .npy that is larger than memory
    E.score(z, t)                           # z (B, *shape), t a number or (B,)   ->   (B, *shape)
    E.score(z, t, y)                        # the same over the points of class y (B,) only

Three things make it less simple than it looks, and the code below is shaped by them:

1. *Size.* B queries against N points is a B x N matrix that does not fit in memory. It is never formed: the points
   stream by in chunks, and a running (max, sum, weighted sum) is kept. The same three numbers merge over processes.
2. *Precision.* At t = .001 the exponents reach 1e7, and an fp32 product, good to seven digits, is wrong by whole nats.
   All products here are float64, of centred data, which leaves errors far below a thousandth of a nat at any t.
3. *The expansion.* |z - alpha x|^2 = |z|^2 - 2 alpha z.x + alpha^2 |x|^2; the first term is the same for every i and
   drops out of the softmax, so it is never added: exponent_i = (alpha z.x_i - alpha^2 |x_i|^2 / 2) / sigma^2.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------------------
# One prediction from another. All go by way of x, the data prediction, which is finite for every t; t is () or (B,).

def need(ok, message):
    if not ok: raise ValueError(message)

def double(t, device):                                       # in this order, since MPS has no float64
    return t.to(device).double() if torch.is_tensor(t) else torch.tensor(t, dtype=torch.float64, device=device)

def like(t, z):                                              # t () or (B,) -> broadcasts over z (B, *shape)
    t = t.to(z.device).to(z.dtype) if torch.is_tensor(t) else torch.tensor(t, dtype=z.dtype, device=z.device)
    return t.reshape(-1, *[1] * (z.ndim - 1))

def score_from_x(x, z, t):    t = like(t, z); return ((1 - t) * x - z) / t**2  # s = (alpha x - z)/sigma^2
def velocity_from_x(x, z, t): return (z - x) / like(t, z)  # v = (z - x)/t
def noise_from_x(x, z, t):    t = like(t, z); return (z - (1 - t) * x) / t  # eps = (z - alpha x)/sigma
def x_from_score(s, z, t):    t = like(t, z); return (z + t**2 * s) / (1 - t)  # singular at t = 1
def x_from_velocity(v, z, t): return z - like(t, z) * v
def x_from_noise(e, z, t):    t = like(t, z); return (z - t * e) / (1 - t)  # singular at t = 1


class Overlap(NamedTuple):
    log_c: torch.Tensor       # log C(t) of the closest pair, the shape of t; -inf where there is no pair
    distance: float           # |x_i - x_j| of that pair
    pair: tuple | None        # (i, j)
    duplicates: int           # pairs with x_i = x_j exactly, left out of the above


class Posterior(NamedTuple):
    """The softmax over the points, streamed: what is left of the weights once the points have passed by. float64."""
    max: torch.Tensor         # (B,)    largest exponent
    sum: torch.Tensor         # (B,)    sum_i exp(exponent_i - max)
    sum_sq: torch.Tensor      # (B,)    sum_i exp(exponent_i - max)^2
    weighted: torch.Tensor    # (B, D)  sum_i exp(exponent_i - max) (x_i - centre)

    @staticmethod
    def merge(parts):
        """Posteriors over disjoint sets of points -> that over all of them: rescale to the common maximum, add."""
        m = torch.stack([p.max for p in parts])                                                  # (parts, B)
        c = torch.where(m == -torch.inf, 0.0, torch.exp(m - m.amax(0)))                     # an empty part adds nothing
        return Posterior(m.amax(0), sum(ci * p.sum for ci, p in zip(c, parts, strict=True)),
                         sum(ci**2 * p.sum_sq for ci, p in zip(c, parts, strict=True)),
                         sum(ci[:, None] * p.weighted for ci, p in zip(c, parts, strict=True)))


class EmpiricalScore:
    """The empirical score of the points x (N, *shape) with labels y (N,), and all that is known once one has it.

    x        a tensor, an array or a memory map, of any floating or integer type; read in chunks, never copied whole.
    device   where the arithmetic is done (default: where x is). MPS has no float64: there it is done on the CPU.
    chunk    data points per step. The extra memory is a few arrays of 2^24 doubles at the default, whatever N is.
    process_group   shard the points over its ranks. Every rank passes all of x (each reads its part) and the *same*
             queries, and gets the same result.
    Queries are z (B, *shape); t is a number or (B,) in (0, 1]; labels are (B,), and None means over all points. Results
    have z's shape, dtype and device. ValueError: t outside (0, 1], nan in z or x, an unknown label, a wrong shape.
    """

    def __init__(self, x, y=None, *, device=None, chunk=None, process_group=None):
        need(len(x) > 0, "the data set is empty")
        need(x.ndim > 1, f"the data must have shape (N, *shape), not {tuple(x.shape)}")
        need(chunk is None or chunk > 0, f"chunk must be at least 1, not {chunk}")
        device = torch.device(device if device is not None else x.device if torch.is_tensor(x) else "cpu")
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.shape, self.x = tuple(x.shape[1:]), x.reshape(len(x), -1)                           # (N, D), a view
        self.N, self.D = self.x.shape
        self.chunk = chunk or max(1, min(2**24 // self.D, 2**14))
        self.group = process_group
        rank, world = (dist.get_rank(process_group), dist.get_world_size(process_group)) if process_group else (0, 1)
        self.shard = range(self.N * rank // world, self.N * (rank + 1) // world)

        # Distances are differences of large numbers when the data are far from the origin: centre them.
        self.centre = torch.zeros(self.D, dtype=torch.float64, device=self.device)
        total = sum((rows.sum(0) for _, rows in self._chunks()), self.centre)
        self.centre = self._gather(total).sum(0) / self.N                                        # (D,)
        need(self.centre.isfinite().all(), "the data hold nan or inf")
        self.sq = torch.cat([rows.square().sum(1) for _, rows in self._chunks()]
                            or [self.centre[:0]])                                       # |x_i - centre|^2, of the shard
        self.members, self._closest = None, {}
        if y is not None:
            y = y.cpu() if torch.is_tensor(y) else torch.from_numpy(np.array(y))
            need(y.shape == (self.N,), f"{self.N} points need {self.N} labels, not {tuple(y.shape)}")
            order = y.argsort(stable=True)
            labels, counts = y[order].unique_consecutive(return_counts=True)
            self.members = dict(zip(labels.tolist(), order.split(counts.tolist()), strict=True))  # label -> indices

    # ---- the points, the queries ------------------------------------------------------------------------------------

    def _rows(self, index):
        """Points at `index`, a slice or (n,) indices -> (n, D) float64, centred."""
        rows = self.x[index if isinstance(index, slice) or torch.is_tensor(self.x) else index.numpy()]
        rows = rows.to(self.device) if torch.is_tensor(rows) else torch.from_numpy(np.array(rows)).to(self.device)
        return rows.to(torch.float64) - self.centre

    def _chunks(self, members=None):
        """Yield (indices (n,), centred points (n, D)) over this rank's shard, or those of its points in `members`."""
        if members is None:
            for i in range(self.shard.start, self.shard.stop, self.chunk):
                j = min(i + self.chunk, self.shard.stop)
                yield torch.arange(i, j), self._rows(slice(i, j))
        else:
            if self.group is not None:
                members = members[(members >= self.shard.start) & (members < self.shard.stop)]
            for index in members.split(self.chunk) if len(members) else ():
                yield index, self._rows(index)

    def _sq(self, index):
        """|x_i - centre|^2 of points of this shard, (n,)."""
        return self.sq[(index - self.shard.start).to(self.device)]

    def _gather(self, a):
        """(...) -> (ranks, ...): the tensor of every rank, in rank order."""
        if self.group is None: return a[None]
        parts = [torch.empty_like(a) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, a.contiguous(), group=self.group)
        return torch.stack(parts)

    def _queries(self, z, t, y=None):
        """Check the arguments. -> z (B, D) and t (B,) in float64, and a list of groups (query rows, members).

        Queries of one class go together, since they need the same points; a group is split where the matrix of queries
        by chunk would become larger than 2^24.
        """
        B, t = len(z), double(t, self.device)
        need(z.shape[1:] == self.shape, f"queries must have shape (B, {str(self.shape)[1:]}, not {tuple(z.shape)}")
        need(z.is_floating_point(), f"the queries z must be floating point, not {z.dtype}")
        need(z.isfinite().all(), "the queries z hold nan or inf")
        need(t.shape in ((), (B,)), f"{B} queries need one t or {B}, not {t.numel()}")
        bad, t = t.reshape(-1)[~((t > 0) & (t <= 1)).reshape(-1)].tolist(), t.expand(B)
        need(not bad, f"t must lie in (0, 1], not {bad[:1]}: at t = 0 a finite set of points has no score")
        groups = [(torch.arange(B), None)]
        if y is not None:
            need(self.members is not None, "labels were asked for, but the data set was given without labels")
            y = torch.as_tensor(y).cpu()
            need(y.shape in ((), (B,)), f"{B} queries need {B} labels, not {y.numel()}")
            y = y.expand(B)
            self._need_labels(y.tolist())
            groups = [((y == label).nonzero()[:, 0], self.members[label]) for label in y.unique().tolist()]
        block = max(1, 2**24 // self.chunk)
        return z.flatten(1).to(self.device).to(torch.float64), t, [(q, m) for g, m in groups for q in g.split(block)]

    def _need_labels(self, asked):
        unknown, there = sorted(set(asked) - set(self.members or ())), sorted(self.members or ())
        few = there if len(there) <= 12 else f"{there[0]} .. {there[-1]} ({len(there)} of them)"
        need(not unknown, f"no data point has label {unknown[:1]}; the labels are {few}")

    def _exponents(self, z, t, members):
        """Yield (indices (n,), points (n, D), exponents (B, n)) by chunks: the logits of Eq. (2), up to a constant."""
        alpha, var = (1 - t)[:, None], t[:, None]**2
        z = alpha * (z - alpha * self.centre) / var                                              # (B, D)
        for index, rows in self._chunks(members):
            yield index, rows, z @ rows.T - alpha**2 / (2 * var) * self._sq(index)

    def _local_posterior(self, z, t, members):
        """The streamed softmax over this rank's points; an empty shard gives max = -inf and sums of 0."""
        zero = z.new_zeros(len(z))
        p = Posterior(zero - torch.inf, zero, zero, torch.zeros_like(z))
        for _, rows, e in self._exponents(z, t, members):
            m = e.amax(1)
            w = torch.exp(e - m[:, None])                                                        # (B, n)
            p = Posterior.merge([p, Posterior(m, w.sum(1), w.square().sum(1), w @ rows)])
        return p

    @torch.no_grad()
    def _posterior(self, z, t, y):
        """-> Posterior over all queries, ranks merged."""
        z, t, groups = self._queries(z, t, y)
        out = Posterior(*(z.new_zeros(len(z)) for _ in range(3)), torch.zeros_like(z))
        for q, members in groups:
            q = q.to(self.device)
            ranks = zip(*[self._gather(a) for a in self._local_posterior(z[q], t[q], members)], strict=True)
            for whole, part in zip(out, Posterior.merge([Posterior(*r) for r in ranks]), strict=True):
                whole[q] = part
        return out

    # ---- what one asks ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _answer(self, z, t, y, convert=None):
        p = self._posterior(z, t, y)
        x = p.weighted / p.sum[:, None] + self.centre                                            # (B, D), float64
        if convert:                                         # in float64: alpha x_* - z is a small difference at small t
            x = convert(x, z.flatten(1).to(self.device).to(torch.float64), t)
        return x.view(-1, *self.shape).to(z.dtype).to(z.device)

    def posterior_mean(self, z, t, y=None):
        """x_*(z, t) = sum_i w_i x_i, the best guess of the clean image. (B, *shape)."""
        return self._answer(z, t, y)

    def score(self, z, t, y=None):
        """s_*(z, t) = grad log p_t(z), Eq. (2). (B, *shape)."""
        return self._answer(z, t, y, score_from_x)

    def velocity(self, z, t, y=None):
        """v_*(z, t) = (z - x_*)/t, the target of v-prediction; exact at t = 1, where by way of s it is 0/0."""
        return self._answer(z, t, y, velocity_from_x)

    def effective_size(self, z, t, y=None):
        """1 / sum_i w_i^2 (B,): how many points share the softmax. 1: it collapsed on one; N: all weigh alike."""
        p = self._posterior(z, t, y)
        return (p.sum**2 / p.sum_sq).to(z.dtype).to(z.device)

    @torch.no_grad()
    def sample_posterior(self, z, t, y=None, generator=None):
        """(B,) int64 indices i, drawn exactly from the weights w(z, t), r_z of C.7.

        By inversion: a uniform number a query, then the first point at which the running sum of the weights exceeds it.
        It takes a second pass over the points, but the draw depends on the generator alone, not on chunks or ranks.
        """
        p = self._posterior(z, t, y)
        where = generator.device if generator else self.device
        u = torch.rand(len(z), generator=generator, device=where,
                       dtype=torch.float32 if where.type == "mps" else torch.float64)
        u = double(u, self.device) * p.sum
        if self.group is not None:                           # every rank must look for the same number
            dist.broadcast(u, dist.get_global_rank(self.group, 0), group=self.group)
        z64, t64, groups = self._queries(z, t, y)
        out = torch.zeros(len(z), dtype=torch.int64, device=self.device)
        for q, members in groups:
            q = q.to(self.device)
            run, passed = torch.zeros_like(u[q]), torch.zeros_like(q)
            if self.group is not None:                       # start where the ranks before this one end
                mine = self._local_posterior(z64[q], t64[q], members)
                run = self._gather(mine.sum * torch.exp(mine.max - p.max[q]))[:dist.get_rank(self.group)].sum(0)
            for _, _, e in self._exponents(z64[q], t64[q], members):
                cum = run[:, None] + torch.exp(e - p.max[q][:, None]).cumsum(1)                  # (B, n)
                passed += (cum <= u[q][:, None]).sum(1)
                run = cum[:, -1]
            passed = self._gather(passed).sum(0).clamp(max=(self.N if members is None else len(members)) - 1)
            out[q] = passed if members is None else members.to(self.device)[passed]
        return out.to(z.device)

    @torch.no_grad()
    def r_star(self, z, t):
        """Eq. (4): r_i = |z - alpha x_i| / (sigma sqrt d), r_* the one closest to 1. -> (r_* (B,), its index (B,)).

        Over all of D, and not the nearest neighbour's: inside some shell r_* = 1, however near another point lies.
        """
        z64, t64, groups = self._queries(z, t)
        best = z64.new_full((3, len(z)), torch.inf)                                              # |r - 1|, r, index
        for q, _ in groups:
            q = q.to(self.device)
            alpha = (1 - t64[q])[:, None]
            zc = z64[q] - alpha * self.centre
            near = z64.new_full((3, len(q)), torch.inf)
            for index, rows in self._chunks():
                d2 = zc.square().sum(1, keepdim=True) - 2 * alpha * zc @ rows.T + alpha**2 * self._sq(index)
                r = d2.clamp(min=0).sqrt() / (t64[q][:, None] * self.D**0.5)                     # (B, n)
                gap, i = (r - 1).abs().min(1)
                new = torch.stack([gap, r.gather(1, i[:, None])[:, 0], index.to(self.device)[i].double()])
                near = torch.where(gap < near[0], new, near)
            ranks = self._gather(near)                                                           # (ranks, 3, B)
            best[:, q] = ranks.gather(0, ranks[:, 0].argmin(0).expand(1, 3, -1))[0]
        return best[1].to(z.dtype).to(z.device), best[2].long().to(z.device)

    @torch.no_grad()
    def nearest(self, x, k=1):
        """The k points nearest to each x (B, *shape) -> squared distances (B, k) ascending, indices (B, k)."""
        need(1 <= k <= self.N, f"k must lie between 1 and the number of points, {self.N}, not {k}")
        q64, _, groups = self._queries(x, 1.0)
        dist2, where = q64.new_zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.int64, device=self.device)
        for q, _ in groups:
            q = q.to(self.device)
            qc = q64[q] - self.centre
            best, arg = qc.new_full((len(q), k), torch.inf), torch.zeros_like(where[q])
            for index, rows in self._chunks():
                d2 = qc.square().sum(1, keepdim=True) - 2 * qc @ rows.T + self._sq(index)
                d2, i = torch.cat([best, d2], 1).topk(k, largest=False)
                arg = torch.cat([arg, index.to(self.device).expand(len(q), -1)], 1).gather(1, i)
                best = d2
            best, i = self._gather(best).transpose(0, 1).flatten(1).topk(k, largest=False)       # over the ranks
            arg = self._gather(arg).transpose(0, 1).flatten(1).gather(1, i)
            # The expansion leaves 1e-12 where a distance is 0. Take the few that are left by direct differences.
            step = max(1, self.chunk // k)
            best = torch.cat([(self._rows(a.flatten().cpu()).view(*a.shape, -1) - c[:, None]).square().sum(2)
                              for a, c in zip(arg.split(step), qc.split(step), strict=True)])
            dist2[q], i = best.sort(dim=1, stable=True)
            where[q] = arg.gather(1, i)
        return dist2.to(x.dtype).to(x.device), where.to(x.device)

    @torch.no_grad()
    def log_overlap(self, t, y=None):
        """log C(t) = max over pairs of -alpha^2 |x_i - x_j|^2 / 8 sigma^2 (B.2): how far the two closest shells
        overlap, over all of D, or over the class y (one label). The pair is the same at every t: it is found once.

        Identical points (|x_i - x_j| = 0 would make C = 1 at every t) are left out and counted. -> Overlap.
        """
        t, y = double(t, "cpu"), y if y is None else int(y)
        need(((t > 0) & (t <= 1)).all(), "t must lie in (0, 1]")
        self._need_labels([y] if y is not None else [])
        if y not in self._closest: self._closest[y] = self._closest_pair(None if y is None else self.members[y])
        d2, pair, duplicates = self._closest[y]
        log_c = -((1 - t) / t)**2 * d2 / 8 if pair else torch.full_like(t, -torch.inf)
        return Overlap(log_c, d2**0.5, pair, duplicates)

    def _closest_pair(self, members):
        """-> (smallest |x_i - x_j|^2 > 0, (i, j), number of identical pairs) over the members, or all."""
        best, pair, duplicates = torch.inf, (-1, -1), 0
        everyone = torch.arange(self.N) if members is None else members
        side = max(1, min(self.chunk, 2**12))                # tiles of side x side, so that memory does not grow with N
        for i_index, rows in ((i, r) for ii, rr in self._chunks(members) for i, r in
                              zip(ii.split(side), rr.split(side), strict=True)):
            for j_index in everyone.split(side):
                if j_index[-1] <= i_index[0]: continue       # each pair once: i < j
                cols = self._rows(j_index)
                scale = rows.square().sum(1)[:, None] + cols.square().sum(1)
                d2 = scale - 2 * rows @ cols.T
                d2[(j_index <= i_index[:, None]).to(self.device)] = torch.inf
                # where the expansion cannot tell 0 from a small distance, take the difference itself
                for ij in (d2 <= 1e-9 * scale).nonzero().split(self.chunk):
                    exact = (rows[ij[:, 0]] - cols[ij[:, 1]]).square().sum(1)
                    duplicates += int((exact == 0).sum())
                    d2[ij[:, 0], ij[:, 1]] = torch.where(exact == 0, torch.inf, exact)
                if (m := d2.min().item()) < best:
                    at = divmod(int(d2.argmin()), d2.shape[1])
                    best, pair = m, (int(i_index[at[0]]), int(j_index[at[1]]))
        ranks = self._gather(torch.tensor([best, *pair, duplicates], dtype=torch.float64, device=self.device))
        best, i, j, _ = ranks[ranks[:, 0].argmin()].tolist()
        return best, (int(i), int(j)) if i >= 0 else None, int(ranks[:, 3].sum())
