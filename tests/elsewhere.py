"""
A device that this machine does not have, for tests: "cuda" or "mps" by name, the CPU in truth.

    with elsewhere("cuda"):                  # from here on torch.zeros(3, device="cuda") works, and says where it is
        E = EmpiricalScore(x, device="cuda")

Every call of torch is looked at. Whether a tensor is on the device is a matter of its storage, so that views, changes
in place and parameters follow by themselves; a result is where the inputs are. What a device refuses is refused:
tensors of two places in one call, numpy() of what is not here, a generator of another place; on "mps", any float64. So
mistakes that only a machine with a GPU would show, show on all. What it does not show: memory, speed, rounding, missing
kernels, torch.compile, calls that python does not see (the backward pass), several GPUs.
"""
import contextlib
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

T = torch.Tensor
DEVICE = T.device.__get__
BOTH = {T.copy_, T.to, T.cpu, T.type_as, T.data.__set__, T.grad.__set__,
        torch._has_compatible_shallow_copy_type}
ON_HOST = {T.numpy, T.__array__}


class Generator(torch.Generator):
    """Draws on the CPU, and says that it is on the device asked for."""
    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self

    device = property(lambda self: self.where)


class Elsewhere(TorchFunctionMode):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.place, self.storages = kind, torch.device(kind, 0), {}

    def there(self, a):
        ref = self.storages.get(a.untyped_storage()._cdata)
        return ref is not None and not ref.expired()         # else the address has become another's

    def put(self, a):
        if self.kind == "mps" and a.dtype in (torch.float64, torch.complex128):
            raise TypeError("the MPS framework doesn't support float64")
        self.storages = {k: r for k, r in self.storages.items() if not r.expired()} \
            if len(self.storages) > 10_000 else self.storages
        self.storages[a.untyped_storage()._cdata] = StorageWeakRef(a.untyped_storage())
        return a

    def asked(self, device):
        return torch.device(device).type == self.kind

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, T)]
        tensors = tensors[:1] if f is T.view_as else tensors     # of the second, only the shape counts
        places = [self.there(a) for a in tensors]
        if f == DEVICE:
            return self.place if places[0] else f(*args)
        if f is T.cpu:
            return args[0].clone() if places[0] else args[0]
        if f in ON_HOST and places[0]:
            raise TypeError(f"can't convert {self.place} device type tensor to numpy: use Tensor.cpu()")
        asked, args, kwargs = self.asked_of(f, args, kwargs, places)
        there = any(places) if asked is None else asked
        generator = kwargs.get("generator")
        if generator is not None and (generator.device.type == self.kind) != there:
            raise RuntimeError(f"{f.__name__}: the generator is not on the device of the result")
        self.need_one_place(f, args, tensors, places)
        if f is T.to and places[0]:
            self.put(torch.empty(0, dtype=f(args[0][:0] if args[0].ndim else args[0], *args[1:], **kwargs).dtype))
        out = f(*args, **kwargs)
        if f is T.to and asked not in (None, places[0]) and out is args[0]:
            out = out.clone()                                # another place is another storage
        if there and f not in {T.copy_, T.__setitem__, T.data.__set__}:
            tree_map_only(T, self.put, out)
        return out

    def asked_of(self, f, args, kwargs, places):
        """Return whether the result is asked for on the device (None: not said), and the arguments for the CPU."""
        if kwargs.get("device") is not None:
            return self.asked(kwargs["device"]), args, kwargs | dict(device="cpu")
        if f is T.to and len(args) > 1 and isinstance(args[1], T):
            return places[1], args, kwargs
        if f is T.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            return self.asked(args[1]), (args[0], "cpu", *args[2:]), kwargs
        return None, args, kwargs

    def need_one_place(self, f, args, tensors, places):
        mixed = any(places) and not all(p or a.ndim == 0 for a, p in zip(tensors, places, strict=True))
        if f is T.__getitem__:                               # indices may be on the CPU, where the data are not
            mixed = not places[0] and any(places)
        elif f is T.__setitem__:                             # by slices, it is a copy
            index = args[1] if isinstance(args[1], tuple) else args[1:2]
            value = args[2] if isinstance(args[2], T) and args[2].ndim else args[0]
            mixed = any(isinstance(i, (T, list)) for i in index) and \
                (self.there(value) != places[0] or not places[0] and any(places))
        if mixed and f not in BOTH:
            what = [f"{self.kind if p else 'cpu'} {tuple(a.shape)}" for a, p in zip(tensors, places, strict=True)]
            raise RuntimeError(f"{f.__name__}: expected all tensors to be on the same device, not {', '.join(what)}")


@contextlib.contextmanager
def elsewhere(kind):
    mode, autocast = Elsewhere(kind), torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu" if device_type == kind else device_type, *args, **kwargs)

    told = dict(is_available=True, get_device_name="NVIDIA H100 80GB HBM3",
                mem_get_info=(70 * 10**9, 80 * 10**9)) if kind == "cuda" else {}
    with contextlib.ExitStack() as stack:
        for where, name, value in (
                *((torch.cuda, k, lambda *_, v=v, **__: v) for k, v in told.items()),
                (torch.backends.mps, "is_available", lambda: kind == "mps"), (torch, "autocast", Autocast),
                (torch, "Generator", Generator)):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mode)
        yield
