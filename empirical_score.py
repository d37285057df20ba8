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

*Flash attention.* With |z|^2 dropped, the exponent is alpha z.x_i / sigma^2 - alpha^2 |x_i|^2 / 2 sigma^2: a query
times a key, plus a bias. So x_* is attention with keys = values = data and one softmax over all N points, and it is
computed as flash attention is: the points stream by in chunks, and a running (max, sum, weighted sum) is kept, never
the B x N matrix. These three merge over chunks, and over the processes among which points or queries are divided.

*The certificate.* Unlike attention, these exponents reach 1e7 (t = .001), where no fast product is precise enough; but
then nearly all weights are zero, and it takes no precision to *prove* it. So there are two passes. The first bounds
every |z - alpha x_i|^2 from below and strikes all points that even at best weigh less than tau/N of the heaviest. Its
product is in bf16, where that is fast, or along an eighth of the directions, those in which the points vary most (both,
where there are thousands): what rounding and the other directions can change is bounded, not estimated. Where too many
are left, it is done along all directions. The second pass takes the few that survive in float64. What was struck weighs
less than tau = 1e-7 of the total; `E.dropped` has the bound that was reached. Queries whose weights are spread (t near
1) keep too many points: they get a dense stream, in fp32 where that loses less than 1e-5, else in float64, or by the
differences z - alpha x, where an outlier makes even float64 cancel. The choice is made for each query by what survives,
not by t. (Screening, streaming and several processes make this longer than its budget of 350 lines.)
"""
import functools
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

SMALL = 2**24   # queries x points x dimensions below which one float64 product is quicker than anything cleverer; of
#                 points on a GPU, 2**13 times that
SURVIVORS = 2**20   # pairs of query and point that may be looked at one by one, so that they fit into memory
FEW = {2: 256, 4: 16}   # an eighth of D, by bytes a number: of less, a product is quicker than reading its result
LOSS = 5e-5     # of an exponent, in fp32, by the estimate in _exponents; x_* then errs by 1e-5 at most, as measured
CACHE = 3 * 2**27   # bytes that copies of the data may take; thrice that on a GPU. Beyond: made anew each time

# ----------------------------------------------------------------------------------------------------------------------
# One prediction from another. All go by way of x, the data prediction, which is finite for every t; t is () or (B,).

def need(ok, message):
    if not ok: raise ValueError(message)

def double(t, device):                                       # in this order, since MPS has no float64
    return t.to(device).double() if torch.is_tensor(t) else torch.tensor(t, dtype=torch.float64, device=device)

def like(t, z):                                              # t () or (B,) -> broadcasts over z (B, *shape)
    t = t.to(z.device).to(z.dtype) if torch.is_tensor(t) else torch.tensor(t, dtype=z.dtype, device=z.device)
    return t.reshape(-1, *[1] * (z.ndim - 1))

def take(a, index):                                          # a[index], but faster on a CPU; a slice, or (n,) indices
    return a[index] if isinstance(index, slice) else a.index_select(0, index.to(a.device))

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
    dropped: torch.Tensor     # (B,)    at most this is missing from `sum`: the points that were struck

    def add(self, b, other):
        """Add to rows b the posterior over other points: rescale both to the common maximum. Empty: adds none."""
        top = torch.maximum(self.max[b], other.max)
        old, new = (torch.where(m == -torch.inf, 0.0, torch.exp(m - top)) for m in (self.max[b], other.max))
        self.max[b] = top
        for mine, others, power in zip(self[1:], other[1:], (1, 2, 1, 1), strict=True):
            columns = (-1, *[1] * (mine.ndim - 1))
            part = mine[b].mul_((old**power).view(columns))
            mine[b] = part.addcmul_(others.double(), (new**power).view(columns))


def wide(device):
    """Do products of 16-bit numbers come in fp32 here, as they are added up? On Nvidia's GPUs, from torch 2.8 on."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads() and not torch.version.hip


def low_precision(device, stored=None):
    """bf16 where a product in it is faster than in fp32 and its sums are kept in fp32 all the same; else fp32. Or fp16,
    which rounds to an eighth of it, where the data are stored so: where the product does not come in fp16, too."""
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False): return torch.float32
        return torch.float16 if stored == torch.float16 and wide(device) else torch.bfloat16
    fast = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if fast and torch.backends.mkldnn.is_available() else torch.float32


@functools.cache
def amd():
    """An AMD CPU with AVX-512: MKL, which torch asks for fp32 products, takes twice as long as oneDNN (on Zen 5)."""
    cpus = Path("/proc/cpuinfo")
    maker = cpus.read_text() if cpus.exists() else platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(a, b):
    """a @ b.T. oneDNN, which a CPU's bf16 products are left to, compiles a kernel for every shape that it meets, and
    keeps a thousand of them, of a megabyte each: so rows are filled up to multiples of 16, which are fewer. A GPU's
    tensor cores want multiples of 8."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)      # private, but the same from torch 2.0 on
    cpu, in_fp32 = a.device.type == "cpu", a.itemsize == 2 and wide(a.device)
    fp32 = cpu and linear and a.dtype == torch.float32 and a.shape[1] % 16 == 0 and amd()
    if not (in_fp32 or fp32 or cpu and a.dtype == torch.bfloat16): return a @ b.T
    n, m = len(a), len(b)
    a, b = (torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16)) if len(x) % 16 else x for x in (a, b))
    if in_fp32: return torch.mm(a, b.T, out_dtype=torch.float32)[:n, :m]
    return (linear(a, b, None, "none", [], "") if fp32 else a @ b.T)[:n, :m]


def round_to(a, dtype):
    """In that precision; of fp16, which ends at 65504, the largest number for what is larger: the bounds know it."""
    return (a.clamp(-65504, 65504) if dtype == torch.float16 and a.dtype != dtype else a).to(dtype)


class Level(NamedTuple):
    """What a first pass multiplies with: the coordinates c of the points along k directions, in low precision.

    V (D, k) float64, orthonormal, with c = low(V^T x); or None: all directions, c = low(x), made as it is needed.
    """
    dtype: torch.dtype
    kappa: float                         # |V^T (x - V c)| <= kappa |x| for every point
    V: torch.Tensor | None = None
    c: torch.Tensor | None = None        # (n, k)
    beyond: torch.Tensor | None = None   # (n,) fp32 >= |x - V c|: what these directions do not see of a point
    lose: float = 0.0                    # of a product with V, relative: by rounding in float64


class Side(NamedTuple):
    """What the bounds of a first pass need of the queries. p = low @ c.T; see EmpiricalScore._side."""
    low: torch.Tensor         # (B, k)  V^T u
    lower: torch.Tensor       # (B, 3)  times a point's columns, minus p, bounds |q - alpha x|^2 - |q|^2 from below
    upper: torch.Tensor       # (B, 3)  times a point's columns: by this the upper bound is higher
    tiny: torch.Tensor        # (B,)    underflow
    fits: torch.Tensor        # (B,)    False where numbers are so large that p could overflow
    qq: torch.Tensor          # (B,)    |q|^2, float64


def exactly(method):
    """Run a method without gradients and autocast, with fp32 products in fp32 (not TF32) and sums of 16-bit products in
    fp32 (not 16 bits), whatever the caller has set: the error bounds rest on it."""
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        gpu = torch.backends.cuda.matmul
        sums = (*(f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")), "allow_fp16_accumulation")
        allowed = {name: getattr(gpu, name) for name in sums if hasattr(gpu, name)}          # the last since torch 2.7
        for name in allowed: setattr(gpu, name, False)
        backends = [b for b in (gpu, getattr(torch.backends.mkldnn, "matmul", gpu)) if hasattr(b, "fp32_precision")]
        before = [b.fp32_precision for b in backends]        # torch 2.9 and later keep it in two ways, which may differ
        try: legacy = torch.get_float32_matmul_precision()
        except RuntimeError: legacy = "highest"
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return method(self, *args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(legacy)
            for b, precision in zip(backends, before, strict=True): b.fp32_precision = precision
            for name, value in allowed.items(): setattr(gpu, name, value)
    return run


class EmpiricalScore:
    """The empirical score of the points x (N, *shape) with labels y (N,), and all that is known once one has it.

    x        a tensor, an array or a memory map, of any floating or integer type; read in chunks; copied whole only
             where it is small, as a low-precision and a centred fp32 copy of at most CACHE bytes.
             Fastest: bf16, where the hardware has it; on a GPU fp16, too. Points of a class are read faster where they
             lie together.
    device   where the arithmetic is done (default: where x is). MPS has no float64: there it is done on the CPU.
    chunk    data points per step. The other memory is a few matrices of queries x chunk, whatever N is.
    process_group   divide the work over its ranks. Every rank passes all of x and the *same* queries, and gets the same
             result. What is divided is chosen by memory: the queries, where every rank can have all points at hand (a
             CPU; a GPU on which x lies, or that can keep a low-precision copy of x), else the points.
    split    "queries" or "points": divide these, whatever the memory.
    tau      the weight that may be left out, of a total of 1. `dropped` (B,) bounds what the last answer did leave out.
    Queries are z (B, *shape); t is a number or (B,) in (0, 1]; labels are (B,), and None means over all points. Results
    have z's shape, dtype and device. float64 queries are answered in float64 throughout.
    ValueError: t outside (0, 1], nan in z or x, an unknown label, a wrong shape.
    """

    def __init__(self, x, y=None, *, device=None, chunk=None, process_group=None, split=None, tau=1e-7):
        need(hasattr(x, "shape"), f"the data must be a tensor, an array or a memory map, not {type(x).__name__}")
        need(len(x) > 0, "the data set is empty")
        need(x.ndim > 1, f"the data must have shape (N, *shape), not {tuple(x.shape)}")
        need(chunk is None or chunk > 0, f"chunk must be at least 1, not {chunk}")
        need(0 < tau < 1, f"tau must lie in (0, 1), not {tau}")
        need(split in (None, "queries", "points"), f"split must be 'queries', 'points' or None, not {split!r}")
        device = torch.device(device if device is not None else x.device if torch.is_tensor(x) else "cpu")
        self.device = torch.empty(0, device="cpu" if device.type == "mps" else device).device    # "cuda" -> "cuda:0"
        self.shape, self.x, self.tau, self.dropped = tuple(x.shape[1:]), x.reshape(len(x), -1), tau, None
        self.N, self.D = self.x.shape                                                            # x (N, D), a view
        gpu = self.device.type == "cuda"                     # there, a matrix product must be large to be fast; on a
        fits = max(1, min(2**(27 if gpu else 22) // self.D, 2**(16 if gpu else 11)))             # CPU, fit caches
        self.chunk = chunk or fits // 16 * 16 or fits                                            # see `product`
        self.piece = min(self.chunk, max(256, self.chunk // 16))         # pairs of query and point at once
        self.block = max(1, 2**(26 if gpu else 20) // self.chunk)                                # queries at once
        sample = self.x[:1] if torch.is_tensor(x) else torch.from_numpy(np.array(self.x[:1]))
        exact = sample.is_floating_point() and sample.itemsize <= 4 or sample.itemsize <= 2      # in fp32
        self.work = torch.float32 if exact else torch.float64
        self.low, self.copies = low_precision(self.device, sample.dtype), {}                     # {dtype: (n, D)}
        most, size = CACHE * (3 if gpu else 1), self.D * self.low.itemsize

        # Each rank has queries `turn` and points `shard`. All must choose alike, or they would wait for ever.
        self.group = group = process_group
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.at_hand = torch.is_tensor(x) and x.device == self.device
        self.small = SMALL * (2**13 if gpu and self.at_hand else 1)
        whole = split == "queries" or split is None and (not gpu or self.at_hand or self.N * size <= most)
        whole = self._gather(torch.tensor(int(whole), device=self.device)).all()
        self.split, self.turn = ("queries", slice(self.rank, None, self.world)) if whole else ("points", slice(None))
        self.shard = range(self.N * self.rank // self.world, self.N * (self.rank + 1) // self.world)

        # Distances are differences of large numbers when the data are far from the origin: centre them.
        self.centre, self.off_centre = torch.zeros(self.D, dtype=torch.float64, device=self.device), False
        total = sum((torch.cat([r.sum(0), r.square().sum()[None]]) for *_, r in self._chunks()),
                    self.centre.new_zeros(self.D + 1))
        total = self._gather(total).sum(0) / self.N                                              # (D + 1,)
        need(total.isfinite().all(), "the data hold nan or inf, or their squares overflow")
        if whole: self.shard = range(self.N)                 # the sums were divided all the same
        # Copies of the centred points, where they are small: in low precision, and in fp32. Nearly centred, in low
        # precision, and here: x itself can be the former. On a GPU, nearly is enough: a chunk is then only converted.
        made, left = {}, most
        nearly = self.at_hand and 2 * total[:-1].square().sum() < total[-1]
        if nearly and x.dtype == self.low:
            self.copies[self.low] = self.x[self.shard.start:self.shard.stop]
        elif not (nearly and gpu):
            self.off_centre = True                           # a number of the precision that x - centre is taken in
            self.centre = total[:-1].to(self.work).double()
        for dtype in dict.fromkeys((self.low, torch.float32)):                         # they can be the same
            takes = len(self.shard) * self.D * dtype.itemsize * 9 // 8               # an eighth more: see _levels
            handy = dtype in self.copies or gpu and self.at_hand and dtype != self.low # no copy is worth its memory
            if not handy and takes <= left:
                left -= takes
                made[dtype] = torch.empty(len(self.shard), self.D, dtype=dtype, device=self.device)

        # Of every point, about the centre: |x|^2; and of all, the largest |low(x) - x| / |x|, rounded up
        self.sq, self.kappa = torch.empty(len(self.shard), dtype=torch.float64, device=self.device), 0.0
        for _, i, rows in self._chunks():
            low = round_to(rows.to(self.work), self.low)
            for dtype, copy in made.items(): copy[i] = low if dtype == self.low else rows.to(dtype)
            self.sq[i] = rows.square().sum(1)
            err = (rows - low.double()).norm(dim=1) / self.sq[i].sqrt().clamp(min=1e-150)
            self.kappa = max(self.kappa, err.max().item() + 2**-22)
        self.room = (4 if gpu else 1) * CACHE - sum(copy.nbytes for copy in made.values())
        self.copies |= made
        self.radius = self._gather(self.sq.amax(0, keepdim=True) if len(self.sq) else self.sq.new_zeros(1)).max().sqrt()
        self.members, self._closest = None, {}
        if y is not None:
            y = self._integers(y)
            need(y.shape == (self.N,), f"{self.N} points need {self.N} labels, not {tuple(y.shape)}")
            self.labels, order = y.to(self.device), y.argsort(stable=True)
            labels, counts = y[order].unique_consecutive(return_counts=True)
            self.members = dict(zip(labels.tolist(), order.split(counts.tolist()), strict=True))  # label -> indices

    # ---- the points, the queries ------------------------------------------------------------------------------------

    @staticmethod
    def _integers(y):                                        # labels, of any type, as int64 on the CPU
        y = y.cpu() if torch.is_tensor(y) else torch.from_numpy(np.array(y))
        need(not y.is_floating_point() and not y.is_complex(), f"labels must be integers, not {y.dtype}")
        return y.long()

    def _read(self, index):
        """Points at `index`, a slice or (n,) indices, as they are -> (n, D), on the device or pinned for the way."""
        if torch.is_tensor(self.x): rows = take(self.x, index)
        else: rows = torch.from_numpy(np.array(self.x[index if isinstance(index, slice) else index.cpu().numpy()]))
        return rows.pin_memory() if rows.device.type == "cpu" and self.device.type == "cuda" else rows

    def _at(self, index):
        """Points at `index`, a slice or (n,) indices -> where they are in this rank's shard: in copies, sq, c."""
        i = self.shard.start
        return slice(index.start - i, index.stop - i) if isinstance(index, slice) else (index - i).to(self.device)

    def _rows(self, index, dtype=torch.float64, read=None):
        """Points at `index` -> (n, D), centred."""
        if dtype in self.copies: return take(self.copies[dtype], self._at(index))
        rows = (self._read(index) if read is None else read).to(self.device, non_blocking=True)
        if not self.off_centre: return round_to(rows, dtype)
        work = torch.float64 if dtype == torch.float64 else self.work
        centre, own = self.centre.to(work), rows.dtype != work or torch.is_tensor(index)         # own: a copy already
        return round_to(rows.to(work).sub_(centre) if own else rows - centre, dtype)

    def _chunks(self, members=None, dtype=torch.float64, c=None):
        """Yield (indices (n,), their places in the shard, centred points (n, D)) over this rank's shard, or its points
        in `members`; with c (shard, k), instead of points, rows of c. A thread reads a chunk ahead: a disk, or the way
        to a GPU, is busy while the arithmetic is."""
        n, first = (len(self.shard), self.shard.start) if members is None else (len(members), 0)
        where = [slice(first + i, first + min(i + self.chunk, n)) for i in range(0, n, self.chunk)]
        if members is not None:                              # a slice where they lie together, else their indices
            where = [members[w] for w in where]
            where = [slice(int(w[0]), int(w[-1]) + 1) if w[-1] - w[0] == len(w) - 1 else w for w in where]
        names = lambda w: (torch.arange(w.start, w.stop) if isinstance(w, slice) else w, self._at(w))
        c = self.copies.get(dtype) if c is None else c
        if self.at_hand or len(where) < 2 or c is not None:
            yield from ((*names(w), self._rows(w, dtype) if c is None else take(c, self._at(w))) for w in where)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, where[0])
            for w, following in zip(where, [*where[1:], None], strict=True):
                rows = ahead.result()
                if following is not None: ahead = reader.submit(self._read, following)
                yield *names(w), self._rows(w, dtype, rows)

    def _gather(self, a):
        """(...) -> (ranks, ...): the tensor of every rank, in rank order."""
        if self.group is None: return a[None]
        parts = [torch.empty_like(a) for _ in range(self.world)]
        dist.all_gather(parts, a.contiguous(), group=self.group)
        return torch.stack(parts)

    def _queries(self, z, t, y=None):
        """Check the arguments. -> z (B, D) and t (B,) in float64, and a list of groups (query rows, members, labels).

        All queries are checked, so that every rank raises; the groups hold those that are this rank's turn. Queries of
        one class go together, since they need the same points, its members; a group is split where the matrix of
        queries by chunk would become too large. Where all is small, one group has all classes, and the labels (b,) of
        its queries, whose exponents at points of another class are -inf then: that is quicker than class by class.
        """
        need(torch.is_tensor(z), f"the queries z must be a tensor, not {type(z).__name__}")
        B, t = len(z), double(t, self.device)
        need(z.shape[1:] == self.shape, f"queries must have shape (B, {str(self.shape)[1:]}, not {tuple(z.shape)}")
        need(z.is_floating_point(), f"the queries z must be floating point, not {z.dtype}")
        need(z.isfinite().all(), "the queries z hold nan or inf")
        need(t.shape in ((), (B,)), f"{B} queries need t of shape () or ({B},), not {tuple(t.shape)}")
        bad, t = t.reshape(-1)[~((t >= 1e-18) & (t <= 1)).reshape(-1)].tolist(), t.expand(B)     # t^2 is an fp32
        need(not bad, f"t must lie in (0, 1] (1e-18 on), not {bad[:1]}: at t = 0 a finite set of points has no score")
        mine = torch.zeros(B, dtype=torch.bool)
        mine[self.turn] = True
        groups, labels = [(mine, None)], None
        if y is not None:
            need(self.members is not None, "labels were asked for, but the data set was given without labels")
            y = self._integers(y)
            need(y.shape in ((), (B,)), f"{B} queries need labels of shape () or ({B},), not {tuple(y.shape)}")
            y = y.expand(B)
            self._need_labels(y.tolist())
            ends = torch.tensor([self.shard.start, self.shard.stop])     # members ascend: a slice lies in the shard
            here = lambda i: i if self.split == "queries" else i[slice(*torch.searchsorted(i, ends).tolist())]
            if B * self.N * self.D <= self.small:
                labels = y
            else:
                groups = [(mine & (y == label), here(self.members[label])) for label in y[mine].unique().tolist()]
        groups = [(q.to(self.device), m, None if labels is None else labels[q].to(self.device))
                  for g, m in groups for q in g.nonzero()[:, 0].split(self.block) if len(q)]
        return z.flatten(1).to(self.device).to(torch.float64), t, groups

    def _need_labels(self, asked):
        unknown, there = sorted(set(asked) - set(self.members or ())), sorted(self.members or ())
        few = there if len(there) <= 12 else f"{there[0]} .. {there[-1]} ({len(there)} of them)"
        need(not unknown, f"no data point has label {unknown[:1]}; the labels are {few}")

    # ---- the first pass: which points can matter? -------------------------------------------------------------------

    @functools.cached_property
    def _levels(self):
        """The first passes to try, cheapest first: along an eighth of the directions, where that saves time, then along
        all of them."""
        n = len(self.shard)
        k = min(self.D // 8, n // 32, 512, 2**24 // self.D, self.room // max(1, n * self.low.itemsize))
        levels = [self._principal(k)] if k >= 16 and self.D // 8 >= FEW[self.low.itemsize] else []
        return levels + [Level(self.low, self.kappa)] + [Level(torch.float32, 2.0**-22)] * (self.low != torch.float32)

    def _principal(self, k):
        """The level of the k directions in which the points vary most, or nearly so: the bounds hold for any."""
        few = min(len(self.shard), 4096, max(k, 2**24 // self.D))
        some = self._rows(torch.linspace(self.shard.start, self.shard.stop - 1, few).long().unique())
        some /= self.radius.clamp(min=1e-150)
        V = torch.randn(self.D, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.device)
        for _ in range(3): V = torch.linalg.qr(some.T @ (some @ V)).Q        # subspace iteration
        lose = (self.D + 64) * k**0.5 * 2.0**-50
        eta = (V.T @ V - torch.eye(k, dtype=V.dtype, device=self.device)).norm().item() + lose   # >= |V^T V - 1|
        c = torch.empty(len(self.shard), k, dtype=self.low, device=self.device)
        beyond, kappa = torch.empty(len(self.shard), device=self.device), 0.0
        for _, i, rows in self._chunks():
            exact = rows @ V                                                                     # (n, k)
            c[i] = round_to(exact, self.low)
            low, sq = c[i].double(), self.sq[i]
            size = low.square().sum(1)
            rest = sq - 2 * (low * exact).sum(1) + (1 + eta) * size + lose * (sq + size)         # >= |x - V c|^2
            beyond[i] = (rest.clamp(min=0).sqrt() * (1 + 2**-20)).float()
            err = (exact - low).norm(dim=1) + eta * size.sqrt() + lose * sq.sqrt()
            kappa = max(kappa, (err / sq.sqrt().clamp(min=1e-150)).max().item())
        return Level(self.low, kappa, V, c, beyond, lose)

    def _side(self, q, alpha, level):
        """What the bounds need of the queries q (B, D), which are z - alpha centre, in float64.

        |q - alpha x|^2 = |q|^2 + alpha^2 |x|^2 - u.x, with u = 2 alpha q. Let a = low(V^T u), and u~, x~ what lies
        beyond V: u - V V^T u, x - V c. Then the product p = fl(a.c) misses u.x by

            | p - u.x | <= |u~| |x~| + kappa |V^T u| |x|        Cauchy-Schwarz, beyond V and on it
                           + |a - V^T u| |c|                    the query's rounding
                           + (k + 20) 2^-23 |a| |c|             sums in fp32, in any order: twice what they can lose
                           + 1.02 2^-8 |a| |c|                  where p comes in bf16

        hence bounds on the distance, linear in p and three numbers of a point, its `_columns` |x|^2, |x| and |x~|."""
        qq, u = q.square().sum(1), 2 * alpha[:, None] * q
        inside = u if level.V is None else u @ level.V                                           # (B, k)
        length, beyond = u.norm(dim=1), 0 * qq if level.V is None else (u - inside @ level.V.T).norm(dim=1)
        low = round_to(inside, level.dtype)
        size, sums = low.double().norm(dim=1), (low.shape[1] + 20) * 2.0**-23
        share = sums + (1.02 * 2.0**-8 if level.dtype == torch.bfloat16 and not wide(self.device) else 0)
        at_x = (low.double() - inside).norm(dim=1) + share * size + level.kappa * inside.norm(dim=1)
        width = torch.stack([at_x, beyond], 1) + level.lose * length[:, None]                    # (B, 2)
        width, a2 = width * (1 + 2**-18 + 2 * sums), alpha[:, None]**2
        return Side(low, torch.cat([(1 - 2 * sums) * a2, -width], 1).float(),
                    torch.cat([4 * sums * a2, 2 * width], 1).float(),
                    low.shape[1] * 2.0**-122 * (1 + length + self.radius),
                    torch.maximum((length + size + 1) * (self.radius + 1), qq + self.radius**2) < 1e36, qq)

    def _columns(self, at, level):                           # (n, 3); |x| also bounds |c|, rounded (tiny fp16: by much)
        sq = self.sq[at]
        beyond = 0 * sq if level.V is None else level.beyond[at]
        return torch.stack([sq, sq.sqrt() * (1 + max(2**-7, 1.01 * level.kappa)), beyond], 1).float()

    def _bounds(self, side, level, members, done):
        """Chunk by chunk, for the queries that are not given up, yield their rows (b,), the same as an index, the
        indices of the points (n,), their columns (n, 3), and lower bounds (b, n) on |q - alpha x|^2 - |q|^2; these lie
        point by point, which a product writes faster."""
        for index, at, rows in self._chunks(members, level.dtype, level.c):
            live = done.nonzero()[:, 0]
            if not len(live): return
            part, point = slice(None) if len(live) == len(done) else live, self._columns(at, level)
            lower = point @ side.lower[part].T
            yield live, part, index.to(self.device), point, lower.sub_(product(rows, side.low[part])).T

    def _search(self, q, alpha, slack, share, side, level, members, done):
        """Look at the point of the least lower bound exactly -> its |q - alpha x|^2 (B, 1). `done` becomes False where
        far more than `share` (B,) of the first chunk would survive, if no point were nearer than in it: where this is a
        third of them or more; a pass over all points takes long for few queries, too. Then only clear cases stay."""
        least, likely = torch.full_like(q[:, 0], torch.inf).float(), torch.zeros_like(q[:, 0], dtype=torch.int64)
        d2 = q.new_full((len(q), 1), torch.inf)
        for i, (live, part, index, _, lower) in enumerate(self._bounds(side, level, members, done)):
            here = lower.amin(1)
            better = (here < least[part]).nonzero()[:, 0]
            likely[live[better]], least[part] = index[lower[better].argmin(1)], here.minimum(least[part])
            if i == 0:
                cut = self._each(live, likely[live], self._distance(q, alpha)) - side.qq[part] + slack[part]
                near, many = (lower <= cut.float()[:, None]).sum(1), 32 + 6 * share[part] * len(index)
                clear = near <= many / 8
                done[live] = clear & (clear.sum() > len(live) / 8) | ((near > many).sum() <= len(live) / 3)
        live = done.nonzero()[:, 0]
        d2[live, 0] = self._each(live, likely[live], self._distance(q, alpha))
        return d2

    def _screen(self, q, alpha, members, level, limit, k=1, slack=0.0, measure=None):
        """All points that may be among the k best of a query, or within `slack` of the best: certain to miss none.

        Best is smallest in |q - alpha x|^2 (k = 1 then), or in what `measure` makes of bounds on it. -> pairs (query
        (P,), index (P,)), by query and then by index, with the lower bound (P,); and done (B,), False where more than
        limit (B,) points survived, or 4 limit where those of all queries are few (no pairs then)."""
        B, most = len(q), max(k, SURVIVORS // max(1, len(q)))
        limit = limit.clamp(min=max(32, k), max=most)
        few, most = limit.sum() // 2, (4 * limit).clamp(max=most)
        side = self._side(q, alpha, level)
        qq = side.qq
        done, best = side.fits.clone(), q.new_full((B, k), torch.inf)
        promise = torch.full_like(qq, torch.inf).float()     # without a search: of what was looked at, the least bound
        b = i = torch.zeros(0, dtype=torch.int64, device=self.device)
        value = torch.zeros(0, device=self.device)

        def cutoff():                                        # for lower bounds, in their units and rounded up
            cut = best[:, -1] + slack
            cut = cut if measure else cut - qq + 2.0**-40 * (cut + qq) + side.tiny
            return (cut + 2.0**-22 * cut.abs()).float()

        count, passed = torch.zeros(B, dtype=torch.int64, device=self.device), 0

        def crowded(share):                                  # (B,): queries that are given up
            return (count > (share * limit).clamp(min=32)) & ((count > most) | (count.sum() > share * few))

        def prune():
            keep = (value <= cutoff()[b]).logical_and_(done[b]).nonzero()[:, 0]
            return take(b, keep), take(i, keep), take(value, keep)

        search = level.V is not None and not measure
        every = len(self.shard) if members is None else len(members)
        sharp = level.V is None and level.dtype == torch.float32 and not measure         # then its bound will do
        if search: best = self._search(q, alpha, slack, limit / every, side, level, members, done)   # it is cheap
        for live, part, index, point, lower in self._bounds(side, level, members, done):
            order = lower
            if measure:                                      # it wants bounds on the distance itself
                ends = (a[part, None].float() for a in ((1 - 2**-21) * qq - side.tiny, (1 + 2**-21) * qq + side.tiny))
                bounds = lower, torch.addmm(lower.T, point, side.upper[part].T).T
                lower, order = measure(*(a.add_(end) for a, end in zip(bounds, ends, strict=True)), part)
            if not search and k == 1:                        # the likeliest is looked at: the cut sinks farther
                least = order.amin(1)
                near = (least < promise[part]).nonzero()[:, 0]
                promise[part] = torch.minimum(promise[part], least)
                d2, likely, at = q.new_full((len(live), 1), torch.inf), order[near].argmin(1), live[near]
                if sharp:
                    upper = least[near] + (side.upper[at] * point[likely]).sum(1)
                    d2[near, 0] = upper + (1 + 2**-20) * qq[at] + side.tiny[at]
                else: d2[near, 0] = self._each(at, index[likely], self._distance(q, alpha))
                best[part] = torch.minimum(best[part], measure(d2, d2, part)[1] if measure else d2)
            elif k > 1:
                new = order.topk(min(k, len(index)), largest=False).values.double()
                best[part] = torch.cat([best[part], new], 1).topk(k, largest=False).values
            # Most stretches of 8 points have none below the cut: it is quick to look at their minima first.
            cut, size, passed = cutoff()[part], math.gcd(len(index), 8), passed + len(index)
            lower = lower.T.view(-1, size, len(live))
            stretch, row = (lower.amin(1) <= cut).nonzero(as_tuple=True)
            there = lower[stretch, :, row]                                                       # (stretches, size)
            hit = there <= cut[row, None]
            here = torch.zeros_like(live).index_add_(0, row, hit.sum(1))
            count[part] += here
            share = min(1, 8 * passed / every) if search else 1
            if crowded(share).any():                         # still so, without those that the cut has passed by?
                b, i, value = prune()
                count = torch.bincount(b, minlength=B)
                count[part] += here
                done &= ~crowded(share)
                (b, i, value), count[~done] = prune(), 0
            of, place = hit.logical_and_(done[live[row], None]).nonzero(as_tuple=True)
            b, i = torch.cat([b, live[row[of]]]), torch.cat([i, index[stretch[of] * size + place]])
            value = torch.cat([value, there[of, place]])
        b, i, value = prune()
        if level is not self._levels[-1] and not measure:    # the same for these pairs, in fp32 along all directions
            level = self._levels[-1]
            side, point = self._side(q, alpha, level), self._columns(self._at(i), level)
            value = self._each(b, i, lambda b, x: take(side.low, b).mul_(x).sum(1), torch.float32)
            value = (side.lower[b] * point).sum(1) - value
            keep = (value <= cutoff()[b]) | ~side.fits[b]
            b, i, value = b[keep], i[keep], value[keep]
        order = (b * self.N + i).argsort()
        return b[order], i[order], value[order], done

    def _each(self, b, i, f, dtype=torch.float64):
        """f(queries (n,), points (n, D)) of pairs (b, i), in pieces -> (P,)."""
        pieces = zip(b.split(self.piece), i.split(self.piece), strict=True)
        return torch.cat([f(bb, self._rows(ii, dtype)) for bb, ii in pieces] or [self.sq.new_zeros(0, dtype=dtype)])

    @staticmethod
    def _distance(q, alpha):
        return lambda b, x: take(q, b).addcmul_(alpha[b, None], x, value=-1).square_().sum(1)

    @staticmethod
    def _apart(q, alpha, rows):
        """|q - alpha x|^2 (b, n) by differences: slower than by a product, but nothing large cancels."""
        d2 = q.new_empty(len(q), len(rows))
        for a in alpha.unique():
            d2[alpha == a] = torch.cdist(q[alpha == a], a * rows, compute_mode="donot_use_mm_for_euclid_dist").square_()
        return d2

    def _far(self, length, alpha):                           # from all points, of a query of this length
        return length > 2 * alpha * self.radius

    @staticmethod
    def _table(b, B, *columns):
        """Pairs sorted by query b (P,) with values (P,) -> tables (B, widest row), short rows filled up with `fill`."""
        count = torch.bincount(b, minlength=B)
        place = torch.arange(len(b), device=b.device) - (count.cumsum(0) - count)[b]
        out = [torch.full((B, max(1, int(count.max()))), fill, dtype=v.dtype, device=v.device) for v, fill in columns]
        for table, (v, _) in zip(out, columns, strict=True): table[b, place] = v
        return out, count

    # ---- the second pass: the softmax -------------------------------------------------------------------------------

    def _survivors(self, q, alpha, var, members, level, limit):
        """Screen, and take what is left exactly. -> done (B,), and of the queries that are done: indices (b, n),
        exponents (b, n), short rows filled up with -inf, with the log of the weight struck (b,) on the same scale, and
        what they are relative to (b,)."""
        n = len(self.shard) if members is None else len(members)
        slack = 2 * var * math.log(self.N / self.tau)
        b, i, lower, done = self._screen(q, alpha, members, level, limit, slack=slack)
        (lower, index), count = self._table(b, len(q), (lower, torch.inf), (i, self.shard.start))
        # Exponents relative to that of a near point, x_0: a product of differences, in which nothing large cancels.
        x_0 = self._rows(index.gather(1, lower.argmin(1, keepdim=True))[:, 0])                   # (B, D)
        half, rate = alpha[:, None] / 2, alpha / var
        middle = q - half * x_0
        relative = self._each(b, i, lambda b, x: take(middle, b).addcmul_(half[b], x, value=-1)
                                                                .mul_(x.sub_(take(x_0, b))).sum(1))
        (e,), _ = self._table(b, len(q), (rate[b] * relative, -torch.inf))
        near = -(q - alpha[:, None] * x_0).square().sum(1) / (2 * var)
        base = torch.where(self._far(q.norm(dim=1), alpha), rate * (x_0 * middle).sum(1), near)
        top = e.amax(1)                                      # not 0, where bounds took another point for the nearest
        struck = (n - count).double().log() - math.log(self.N / self.tau)
        return done, index[done], (e - top[:, None])[done], struck[done], (base + top)[done]

    def _exponents(self, z, t, members, label, tolerance):
        """Yield (queries (b,), indices (n,) or (b, n), points (n, D) or None, exponents (b, n), log of the weight
        struck (b,), base (b,)). The exponents plus the base are those of Eq. (2); of a query that is far from all
        points, whose exponents would be huge and alike, those plus |z - alpha centre|^2 / 2 sigma^2."""
        n, alpha, var = len(self.shard) if members is None else len(members), 1 - t, t**2
        q, rest = z - alpha[:, None] * self.centre, torch.arange(len(z), device=self.device)     # (B, D), (B,)
        # A dense fp32 product misses an exponent by about this much: it is the largest error seen, not a bound.
        small = len(z) * n * self.D <= self.small            # then all are taken in float64, at once
        tolerance = 0 if small else tolerance
        length, rate = q.norm(dim=1), alpha / var
        size = rate * self.radius * (length + alpha * self.radius)
        fine = size * max(1, self.D / 2e5)**0.5 * 2.0**-23 < tolerance
        fine &= rate * torch.maximum(length, alpha) < 1e36   # no overflow
        for level in self._levels if n and not small else ():
            ask = rest if level.V is not None or level.dtype.itemsize == 2 else rest[~fine[rest]]
            if len(ask):
                # about where a dense stream (fp32, float64), or all directions (fp32, bf16) would be quicker
                few = n // (64 if level.dtype == torch.float32 else 512)
                limit = torch.where(fine[ask], n // 256, n // 96) if level.V is None else torch.full_like(ask, few)
                done, index, *found = self._survivors(q[ask], alpha[ask], var[ask], members, level, limit)
                if done.any(): yield ask[done], index, None, *found
                rest = rest[~torch.isin(rest, ask[done])]
        # All points, by a product, in fp32 or float64; or, where too much cancels even so, by differences.
        far = self._far(length, alpha)
        ill = ~far & (size * 2.0**-50 > 1e-7)
        none, base = torch.full_like(t, -torch.inf), torch.where(far, 0, -q.square().sum(1) / (2 * var))
        for dtype, ask in ((torch.float32, rest[fine[rest]]), (torch.float64, rest[(~fine & ~ill)[rest]]),
                           (None, rest[ill[rest]])):
            query, bias = (rate[ask, None] * q[ask]).to(dtype), (-alpha * rate / 2)[ask].to(dtype)
            # Averages of points want less than their exponents do: fp32, where that is 1e-5 sigma / alpha or less
            roughly = dtype == torch.float64 and (size[ask] * 2.0**-23 < 64 * tolerance).all()
            for index, at, rows in self._chunks(members, dtype or torch.float64) if n and len(ask) else ():
                if dtype: e = product(rows, query).addcmul_(self.sq[at].to(dtype)[:, None], bias).T    # (b, n)
                else: e = self._apart(q[ask], alpha[ask], rows).div_(-2 * var[ask, None])
                if roughly: rows = rows.float()
                if label is not None: e = e.where(label[ask, None] == self.labels[index], -torch.inf)
                yield ask, index, rows, e, none[ask], base[ask] if dtype else 0 * base[ask]

    def _stream(self, z, t, y):
        """Yield what `_exponents` does, group by group, for the queries that are this rank's turn."""
        tolerance = LOSS if z.dtype != torch.float64 else 0.0
        z, t, groups = self._queries(z, t, y)
        for q, members, label in groups:
            for b, *found in self._exponents(z[q], t[q], members, label, tolerance): yield q[b], *found

    def _posterior(self, z, t, y):
        """The streamed softmax. -> Posterior, ranks merged, and (B,) what of its sum the ranks before this one have.

        A rank leaves the queries that are not its turn, and those with no points in its shard, as they are: max = -inf
        and sums of 0. So one sum serves, whatever is divided among the ranks.
        """
        columns = (), (), (), (self.D,), ()
        p = Posterior(*(torch.zeros(len(z), *c, dtype=torch.float64, device=self.device) for c in columns))
        p.max.fill_(-torch.inf)
        for b, index, rows, e, struck, base in self._stream(z, t, y):
            m = e.amax(1)                                    # -inf, where none of these points is of the query's class
            top = m.where(m > -torch.inf, 0)
            w, dropped = e.sub_(top[:, None]).exp_(), torch.exp(struck - top.double())           # (b, n), (b,)
            if rows is not None:
                weighted = product(w.to(rows.dtype), rows.T)
            else:                                            # survivors: most weigh nothing, once that is known exactly
                light = (w > 0) & (w < self.tau / self.N)
                dropped, w = dropped + light.sum(1) * self.tau / self.N, w.masked_fill_(light, 0)
                weighted, (r, c) = p.weighted.new_zeros(len(b), self.D), w.nonzero(as_tuple=True)
                for rr, cc in zip(r.split(self.piece), c.split(self.piece), strict=True):
                    weighted.index_add_(0, rr, w[rr, cc][:, None] * self._rows(index[rr, cc]))
            b = b if len(b) < len(z) else slice(None)        # which takes no copies
            p.add(b, Posterior(m.double() + base, w.sum(1), w.square().sum(1), weighted, dropped))
        before = torch.zeros_like(p.sum)
        for i in range(0, len(z), self.block) if self.world > 1 else ():         # one process has nothing to merge
            b = slice(i, i + self.block)
            ranks = [Posterior(*r) for r in zip(*(self._gather(a[b]) for a in p), strict=True)]
            for whole, first in zip(p, ranks[0], strict=True): whole[b] = first
            for rank in ranks[1:]: p.add(b, rank)
            before[b] = sum(r.sum * torch.exp(r.max - p.max[b]) for r in ranks[:self.rank])
        self.dropped = p.dropped / p.sum
        return p, before

    # ---- what one asks ----------------------------------------------------------------------------------------------

    @exactly
    def _answer(self, z, t, y, convert=None):
        p, _ = self._posterior(z, t, y)
        x = p.weighted / p.sum[:, None] + self.centre                                            # (B, D), float64
        if convert:                                         # in float64: alpha x_* - z is a small difference at small t
            x = convert(x, z.flatten(1).to(self.device).to(torch.float64), t)
        x, finite = x.to(z.dtype), x.isfinite().all()        # fp16 ends at 65504, which a score passes at small t
        need(x.isfinite().all() or not finite, f"the answer overflows {z.dtype}: ask with z.float()")
        return x.view(-1, *self.shape).to(z.device), (p.sum**2 / p.sum_sq).to(z.dtype).to(z.device)

    def posterior_mean(self, z, t, y=None):
        """x_*(z, t) = sum_i w_i x_i, the best guess of the clean image. (B, *shape)."""
        return self._answer(z, t, y)[0]

    def score(self, z, t, y=None):
        """s_*(z, t) = grad log p_t(z), Eq. (2). (B, *shape)."""
        return self._answer(z, t, y, score_from_x)[0]

    def velocity(self, z, t, y=None):
        """v_*(z, t) = (z - x_*)/t, the target of v-prediction; exact at t = 1, where by way of s it is 0/0."""
        return self._answer(z, t, y, velocity_from_x)[0]

    def effective_size(self, z, t, y=None):
        """1 / sum_i w_i^2 (B,): how many points share the softmax. 1: it collapsed on one; N: all weigh alike."""
        return self._answer(z, t, y)[1]

    def mean_and_size(self, z, t, y=None):
        """posterior_mean and effective_size, for the price of one."""
        return self._answer(z, t, y)

    @exactly
    def sample_posterior(self, z, t, y=None, generator=None):
        """(B,) int64 indices i, drawn from the weights w(z, t), r_z of C.7; exactly, but for the weight `dropped`.

        By inversion: a uniform number a query, then the first point at which the running sum of the weights exceeds it.
        It takes the exponents twice, but the draw depends on the generator alone, not on chunks or ranks.
        """
        p, run = self._posterior(z, t, y)                    # run: the weight of all points before, other ranks' too
        where = generator.device if generator else self.device
        u = torch.rand(len(z), generator=generator, device=where,
                       dtype=torch.float32 if where.type == "mps" else torch.float64)
        u = double(u, self.device) * p.sum
        if self.group is not None:                           # every rank must look for the same number
            dist.broadcast(u, dist.get_global_rank(self.group, 0), group=self.group)
        out = torch.full((len(z),), -1, device=self.device)
        for b, index, _, e, _, base in self._stream(z, t, y):
            cum = run[b][:, None] + torch.exp(e.double() + (base - p.max[b])[:, None]).cumsum(1)           # (b, n)
            passed = (cum <= u[b][:, None]).sum(1)           # points before the one looked for; all: it comes later
            last = (cum < cum[:, -1:]).sum(1)                # that has a weight
            found = index.to(self.device).expand(len(b), -1).gather(1, passed.minimum(last)[:, None])
            # a point of no weight is never drawn; where rounding leaves the last sum below u, the last one stands
            new = (run[b] <= u[b]) & (cum[:, -1] > run[b])
            out[b], run[b] = torch.where(new, found[:, 0], out[b]), cum[:, -1]
        newer = lambda a, b: torch.where(b >= 0, b, a)       # what the last rank found that found any
        return functools.reduce(newer, self._gather(out)).to(z.device)

    @exactly
    def _best(self, z, alpha, groups, k, measure):
        """The k points of smallest measure(|z - alpha x|^2) for each query; measure takes bounds (lower, upper) (b, n)
        on squared distances, and the rows (b,) of these queries, to bounds on what is to be small.
        -> squared distances (B, k) by direct differences, and indices (B, k), best first."""
        d2 = z.new_full((len(z), k), torch.inf)              # stays so for other ranks' queries, or fewer than k points
        where = torch.zeros_like(d2, dtype=torch.int64)
        for b, *_ in groups:
            best, index = self._best_here(z[b] - alpha[b, None] * self.centre, alpha[b], k,
                                          lambda lower, upper, part, b=b: measure(lower, upper, b[part]))
            d2[b, :best.shape[1]], where[b, :best.shape[1]] = best, index
        d2, where = (self._gather(a).transpose(0, 1).flatten(1) for a in (d2, where))            # (B, ranks k)
        order = measure(d2, d2, slice(None))[0].argsort(dim=1, stable=True)[:, :k]
        return d2.gather(1, order), where.gather(1, order)

    def _best_here(self, q, alpha, k, measure):
        """The same over the points of this rank, for a few queries q (b, D), about the centre; fewer than k (b, <= k)
        where it has fewer."""
        n, rest = len(self.shard), torch.arange(len(q), device=self.device)
        found = [(rest[:0], rest[:0], q[:0, 0])]             # queries, points, squared distances by differences
        for level in self._levels if len(q) * n * self.D > SMALL else ():
            if level.V is not None and k > 1: continue       # only the best is looked at exactly, else bounds are wide
            limit = torch.full_like(rest, n // (64 if level.V is not None or level.dtype.itemsize == 2 else 16))
            b, i, _, done = self._screen(q[rest], alpha[rest], None, level, limit, k,
                                         measure=lambda lo, hi, part, rest=rest: measure(lo, hi, rest[part]))
            found.append((rest[b], i, self._each(rest[b], i, self._distance(q, alpha))))
            rest = rest[~done]
        # Too many are alike: all of them, by a product in float64, with a few more than k, since it errs by `loss`.
        # Where this might have cost one of the k all the same, by differences.
        for exact in (False, True) if n else ():
            kept = min(k + 4 * (not exact), n)
            best, arg = q.new_full((len(rest), kept), torch.inf), torch.zeros_like(rest)[:, None].expand(-1, kept)
            loss = (q[rest].norm(dim=1) + alpha[rest] * self.radius).square()[:, None] * (0 if exact else 2.0**-50)
            for index, at, rows in self._chunks() if len(rest) else ():
                if exact: d2 = self._apart(q[rest], alpha[rest], rows)
                else: d2 = torch.addmm((alpha**2)[rest][:, None] * self.sq[at], -2 * alpha[rest][:, None] * q[rest],
                                       rows.T).add_(q[rest].square().sum(1)[:, None])
                value, j = torch.cat([best, measure(d2 - loss, d2 + loss, rest)[0]], 1).topk(kept, largest=False)
                arg = torch.cat([arg, index.to(self.device).expand(len(rest), -1)], 1).gather(1, j)
                best = value
            b, i = rest.repeat_interleave(kept), arg.flatten()
            d2 = self._each(b, i, self._distance(q, alpha))
            kth = measure(*2 * (d2.view(-1, kept),), rest)[1].kthvalue(min(k, n), dim=1).values
            sure = kth <= best[:, -1] if kept < n and not exact else kth == kth
            found.append(tuple(a[sure.repeat_interleave(kept)] for a in (b, i, d2)))
            rest = rest[~sure]
        b, i, d2 = (torch.cat(a) for a in zip(*found, strict=True))
        b, i, d2 = (a[(b * self.N + i).argsort()] for a in (b, i, d2))
        (d2, i), _ = self._table(b, len(q), (d2, torch.inf), (i, 0))
        order = measure(d2, d2, slice(None))[0].argsort(dim=1, stable=True)[:, :k]
        return d2.gather(1, order), i.gather(1, order)

    def r_star(self, z, t):
        """Eq. (4): r_i = |z - alpha x_i| / (sigma sqrt d), r_* the one closest to 1. -> (r_* (B,), its index (B,)).

        Over all of D, and not the nearest neighbour's: inside some shell r_* = 1, however near another point lies.
        """
        z64, t64, groups = self._queries(z, t)
        scale = t64[:, None] * self.D**0.5                   # sigma sqrt d

        def gap(lower, upper, b):                            # bounds on |r - 1|, wider by what their rounding loses
            s = scale[b].to(lower.dtype)
            lower, upper = (a.clamp(min=0).sqrt() / s - 1 for a in (lower, upper))
            loss = 4 * torch.finfo(lower.dtype).eps * (1 + upper.abs())
            return torch.maximum(lower, -upper).clamp(min=0) - loss, torch.maximum(upper, -lower) + loss
        d2, where = self._best(z64, 1 - t64, groups, 1, gap)
        return (d2.sqrt() / scale)[:, 0].to(z.dtype).to(z.device), where[:, 0].to(z.device)

    def nearest(self, x, k=1):
        """The k points nearest to each x (B, *shape) -> squared distances (B, k) ascending, indices (B, k)."""
        need(1 <= k <= self.N, f"k must lie between 1 and the number of points, {self.N}, not {k}")
        q, t, groups = self._queries(x, 1.0)
        d2, where = self._best(q, torch.ones_like(t), groups, k, lambda lower, upper, _: (lower, upper))
        return d2.to(x.dtype).to(x.device), where.to(x.device)

    @exactly
    def log_overlap(self, t, y=None):
        """log C(t) = max over pairs of -alpha^2 |x_i - x_j|^2 / 8 sigma^2 (B.2): how far the two closest shells
        overlap, over all of D, or over the class y (one label). The pair is the same at every t: it is found once (of
        pairs whose distances agree to 1e-8, any).

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
        for i_index in everyone.split(side)[self.rank::self.world]:
            rows = self._rows(i_index)
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
                if d2.min() < best:
                    at = divmod(int(d2.argmin()), d2.shape[1])
                    best = (rows[at[0]] - cols[at[1]]).square().sum().item()
                    pair = int(i_index[at[0]]), int(j_index[at[1]])
        ranks = self._gather(torch.tensor([best, *pair, duplicates], dtype=torch.float64, device=self.device))
        best, i, j, _ = min(ranks.tolist())                  # the first one, where several pairs are as close
        return best, (int(i), int(j)) if i >= 0 else None, int(ranks[:, 3].sum())
