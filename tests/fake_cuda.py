"""A make-believe GPU: runs CUDA code on a machine without one, with real numbers, and tells where the host would wait.

    with FakeCuda() as gpu:                      # torch.cuda.is_available() is True inside
        x = torch.randn(4, 3, device="cuda")     # x.is_cuda; its numbers lie in main memory
        (x * 2).sum().item()
    gpu.waits                                    # [Event("device-to-host read", "_local_scalar_dense", "f.py:1", ...)]

How: a CudaTensor has the device and the dispatch keys of a tensor on a GPU, so it goes through torch's own code for
CUDA (autocast's lists, autograd, composite functions, `is_cuda` branches) down to the kernels; instead of a kernel, the
operator runs on an inner tensor, on the CPU ("cpu": real numbers) or on the meta device ("meta": shapes only, so that a
ViT-H fits). Checked by it:
  - devices: an operator that mixes CPU and CUDA tensors raises RuntimeError, as on a GPU (0-dim CPU operands are taken
    where CUDA takes them; fused optimizers never take them);
  - waiting: `waits` lists every operator for which the host would wait (reading values, blocking copies, copies from
    memory that is not pinned, boolean indices, nonzero, ...) with its line;
  - types and shapes: `ops` has those of every operator's inputs and outputs, `peak` the bytes held at one time.
Not: kernels' speed and rounding, NCCL, several streams, anything below the operators. torch.autograd's engine cannot
run CUDA nodes without a driver: .backward() is a walk over the real autograd graph.

    python tests/fake_cuda.py            # a table of launches, moved bytes and peak memory of training steps
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import heapq
import importlib
import math
import os
import sys
import traceback
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # before torch is patched below: it looks at signatures
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

VIEWS = set(  # operators that launch nothing
    """view _unsafe_view permute expand detach alias t transpose slice select unsqueeze squeeze split split_with_sizes
    chunk unbind as_strided _reshape_alias empty empty_like empty_strided new_empty new_empty_strided lift_fresh
    diagonal view_as unfold set_ _local_scalar_dense is_pinned resize_ lift _has_compatible_shallow_copy_type
    is_same_size unsafe_split narrow""".split()
)
# Operators whose CUDA kernels wait for a value, whatever their arguments.
WAITING = set("nonzero masked_select _unique2 unique_dim unique_consecutive equal is_nonzero _unique".split())
INDEXING = ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index")


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened on the pretended device."""

    kind: str
    op: str
    where: str  # the project's line, or torch's if none of the project's is on the stack
    phase: str
    detail: str = ""
    step: int = 0  # optimizer steps done before


@dataclasses.dataclass
class Op:
    """One operator that ran on the pretended device."""

    name: str
    phase: str
    backward: bool
    inputs: list  # [(dtype, shape)]
    outputs: list


class CudaTensor(torch.Tensor):
    """To all above the kernels a tensor on cuda:0; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), layout=inner.layout)
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=CUDA, **layout)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended CUDA tensor outside FakeCuda")

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy.detach(), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __format__(self, spec):
        return format(self.item(), spec) if spec else repr(self)

    def __repr__(self, **_):
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def backward(self, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        walk_backward(self, gradient)


_CURRENT: list[FakeCuda] = []


class Stream:
    """torch.cuda.Stream: one, on which everything runs."""

    def record_event(self, event=None):
        return CudaEvent(_CURRENT[-1].launches)

    def synchronize(self):
        _CURRENT[-1].wait("stream synchronisation", "synchronize")


class CudaEvent:
    """torch.cuda.Event; notes how much was launched since it was recorded: work that the host waits for."""

    def __init__(self, launches: int):
        self.launches = launches

    def synchronize(self):
        _CURRENT[-1].event_waits.append(_CURRENT[-1].launches - self.launches)


class FakeCuda(TorchDispatchMode):
    """See the module. inner: where the numbers lie, "cpu" or "meta" (then the host reads 0, or True for a bool); root:
    the project's folder, whose lines events name."""

    def __init__(self, inner: str = "cpu", root: str | Path | None = None, keep_ops: bool = False):
        super().__init__()
        self.inner, self.keep_ops, self.root = inner, keep_ops, str(root) if root else None
        self.phase, self.in_backward, self.step = "", False, 0
        self.ops: list[Op] = []
        self.waits: list[Event] = []
        self.event_waits: list[int] = []
        self.launches = self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.pinned: dict[int, object] = {}
        self.collectives = collections.Counter()
        self.stack: contextlib.ExitStack | None = None

    def where(self) -> str:
        """The project's innermost line on the stack; torch's if there is none."""
        frames = [f for f in reversed(traceback.extract_stack(limit=60)) if "fake_cuda" not in f.filename]
        own = [f for f in frames if self.root and f.filename.startswith(self.root)]
        frame = (own or [f for f in frames if "/torch/" not in f.filename] or frames)[0]
        return f"{Path(frame.filename).name}:{frame.lineno}"

    def wait(self, kind: str, op: str, detail: str = "") -> None:
        self.waits.append(Event(kind, op, self.where(), self.phase, detail, self.step))

    # -- the operators

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.pinned[key] = weakref.finalize(storage, self.pinned.pop, key, None)
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[-1]
        flat, spec = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        cuda = [t for t in tensors if isinstance(t, CudaTensor)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if name in ("_pin_memory", "pin_memory"):
            return args[0] if self._is_pinned(args[0]) else self._pin(args[0].clone())
        if name == "is_pinned":
            return not isinstance(args[0], CudaTensor) and self._is_pinned(args[0])
        if not cuda and (target is None or target.type != "cuda"):
            pin = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            return self._pin(out) if pin else out
        return self._on_device(func, name, args, kwargs, flat, spec, tensors, cuda, target)

    def _on_device(self, func, name, args, kwargs, flat, spec, tensors, cuda, target):
        if name == "_local_scalar_dense":
            self.wait("device-to-host read", name)
            inner = args[0].inner
            return inner.item() if self.inner == "cpu" else inner.dtype == torch.bool or 0
        if name == "_to_copy" and target is not None and isinstance(args[0], CudaTensor) and target.type == "cpu":
            return self._to_host(args[0], kwargs)
        if name == "_to_copy" and target is not None and not isinstance(args[0], CudaTensor):
            return self._finish(func, name, args, kwargs, self._from_host(args[0], kwargs), tensors)
        if name == "copy_" and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
            return self._copy(*args[:2], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        host = [t for t in tensors if not isinstance(t, CudaTensor)]
        self._check_devices(func, name, args, host, tensors)
        if target is not None and target.type == "cpu" and name != "_to_copy":  # e.g. zeros_like(x, device="cpu")
            inner_args, inner_kwargs = tree_map(_unwrap, (args, kwargs))
            return func(*inner_args, **inner_kwargs)
        indices = args[1] if name in INDEXING else ()
        if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.wait("boolean index", name)
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3):
            self.wait("value read by the operator", name)

        inner_args, inner_kwargs = tree_unflatten([self._unwrap_for(t) for t in flat], spec)
        if target is not None:
            inner_kwargs["device"] = torch.device(self.inner)
        inner_kwargs.pop("pin_memory", None)
        out = self._run(func, name, inner_args, inner_kwargs)
        out = tree_map(lambda t: CudaTensor(t) if isinstance(t, torch.Tensor) else t, out)
        return self._finish(func, name, args, kwargs, out, tensors)

    def _to_host(self, source, kwargs) -> torch.Tensor:
        kind = "copy to pageable host memory" if kwargs.get("non_blocking") else "blocking copy to the host"
        self.wait(kind, "_to_copy", f"{tuple(source.shape)}")
        dtype = kwargs.get("dtype") or source.dtype
        if self.inner == "cpu":
            return source.inner.to(dtype=dtype, copy=True)
        return (torch.ones if dtype == torch.bool else torch.zeros)(source.shape, dtype=dtype)

    def _from_host(self, source, kwargs) -> CudaTensor:
        size = f"{tuple(source.shape)} {source.dtype}"
        if source.device.type == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if not kwargs.get("non_blocking"):
            self.wait("blocking copy to the device", "_to_copy", size)
        elif not self._is_pinned(source):
            self.wait("copy from memory that is not pinned", "_to_copy", size)
        if not _dense(source):
            self.wait("copy of a strided host tensor", "_to_copy", size)
        options = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
        return CudaTensor(source.to(self.inner, copy=True, **options))

    def _copy(self, into, source, lazy: bool):
        on_host = source if isinstance(into, CudaTensor) else into
        if not lazy or not self._is_pinned(on_host):
            way = "to the device" if on_host is source else "to the host"
            self.wait(f"blocking copy {way}", "copy_", f"{tuple(source.shape)} {source.dtype}")
        if on_host is source:
            self._count("copy_", [source], [into])
            if self.inner == "cpu":
                into.inner.copy_(source)
        else:
            into.copy_(source.inner) if self.inner == "cpu" else into.zero_()
        return into

    def _check_devices(self, func, name, args, host, tensors) -> None:
        """RuntimeError where a GPU would raise that devices are mixed; what it copies by itself is a wait."""
        if not host:
            return
        if name in INDEXING:
            if all(any(t is i for i in args[1]) for t in host):
                self.wait("index on the host: blocking copy", name)
            elif any(t.ndim for t in host):
                raise RuntimeError(f"{name}: values on the CPU for a CUDA tensor")
        elif any(t.ndim for t in host) or name.startswith(("_fused", "cat", "stack")):
            where = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors[:8])
            raise RuntimeError(f"Expected all tensors to be on the same device in {func}: {where}")
        elif name in ("where", "clamp", "scatter_", "index_fill_", "masked_fill_"):
            self.wait("0-dim CPU operand is copied", name)

    def _unwrap_for(self, value):
        if isinstance(value, CudaTensor):
            return value.inner
        if self.inner == "meta" and isinstance(value, torch.Tensor) and value.ndim:
            return value.to("meta")
        if self.inner == "meta" and isinstance(value, torch.Generator):
            return None
        return value

    def _run(self, func, name, args, kwargs):
        """The operator on the inner tensors; what only CUDA has is put into other words."""
        if name == "cudnn_batch_norm":
            x, weight, bias, mean, var, training, momentum, eps = args
            out, save_mean, save_invstd = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
            return out, save_mean, save_invstd, torch.empty(0, dtype=torch.uint8, device=x.device)
        if name == "cudnn_batch_norm_backward":
            x, gradient, weight, mean, var, save_mean, save_var, eps, _ = args
            known = (weight, mean, var, save_mean, save_var, True, eps)
            return aten.native_batch_norm_backward(gradient, x, *known, [True, True, True])
        if name.startswith("batch_norm_"):
            return _batch_norm_part(name, args)
        if name in ("_softmax", "_log_softmax") and args[2]:  # 16 bits in, 32 out
            return func(args[0].float(), args[1], False)
        if name in ("_softmax_backward_data", "_log_softmax_backward_data") and args[0].dtype != args[3]:
            return func(*args[:3], args[0].dtype).to(args[3])
        if name == "equal" and self.inner == "meta":
            return True
        if name.startswith("_fused_sgd") and self.inner == "meta":  # has no shape function
            return None
        return func(*args, **kwargs)

    def _finish(self, func, name, args, kwargs, out, tensors):
        self._count(name, tensors, [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)])
        if name == "_to_copy":
            return out
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _count(self, name, inputs, outputs) -> None:
        self._account(outputs)
        if name in VIEWS:
            return
        self.launches += 1
        if self.keep_ops:
            shapes = [[(t.dtype, tuple(t.shape)) for t in ts] for ts in (inputs, outputs)]
            self.ops.append(Op(name, self.phase, self.in_backward, *shapes))

    def _account(self, outputs) -> None:
        """Bytes of device memory that are held: inner storages, each once."""
        for tensor in outputs:
            if isinstance(tensor, CudaTensor):
                storage = tensor.inner.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    # -- torch.cuda

    def __enter__(self):
        _CURRENT.append(self)
        self.stack = contextlib.ExitStack()

        def patch(target, attribute, value):
            self.stack.enter_context(mock.patch.object(target, attribute, value))

        if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
            torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing in place of one that looks for a driver
        previous = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, previous)

        stream = Stream()
        real_generator = torch.Generator

        class generator(real_generator):  # a type: annotations name it
            def __new__(cls, device="cpu"):
                return real_generator("cpu")

        numbers = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "set_device": lambda device: None,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: "pretended GPU",
            "get_device_capability": lambda device=None: (8, 0),
            "is_bf16_supported": lambda including_emulation=True: True,
            "_lazy_init": lambda: None,
            "manual_seed_all": lambda seed: None,
            "manual_seed": lambda seed: None,
            "synchronize": lambda device=None: self.wait("device synchronisation", "synchronize"),
            "is_current_stream_capturing": lambda: False,
            "current_stream": lambda device=None: stream,
            "max_memory_allocated": lambda device=None: self.peak,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
        }
        for key, value in numbers.items():
            patch(torch.cuda, key, value)
        if self.inner == "meta":  # a boolean index keeps everything
            from torch.fx.experimental import _config

            patch(_config, "meta_nonzero_assume_all_nonzero", True)
        patch(torch, "Generator", generator)
        compatible = torch._has_compatible_shallow_copy_type  # no: module.to() makes new Parameters, which keep `inner`
        patch(torch, "_has_compatible_shallow_copy_type", lambda a, b: type(a) is type(b) and compatible(a, b))
        patch(torch.accelerator, "is_available", lambda: True)
        patch(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        patch(torch.accelerator, "current_device_index", lambda: 0)
        attention = self._attention(torch.nn.functional.scaled_dot_product_attention)
        patch(torch.nn.functional, "scaled_dot_product_attention", attention)
        patch(torch.Tensor, "pin_memory", lambda t, device=None: t if self._is_pinned(t) else self._pin(t.clone()))
        patch(torch.Tensor, "is_pinned", lambda t, device=None: self._is_pinned(t))
        patch(torch._C, "_current_graph_task_id", lambda: 1 if self.in_backward else -1)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()
        _CURRENT.remove(self)

    def _attention(self, original):
        """F.scaled_dot_product_attention asks the driver which kernel to take; here one, after autocast's rule."""

        def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            if not isinstance(q, CudaTensor):
                return original(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            if torch.is_autocast_enabled("cuda"):
                q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
            options = dict(attn_mask=attn_mask, scale=scale)
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, **options)[0]

        return attention


def _batch_norm_part(name: str, args: tuple):
    """The operators of torch.nn.SyncBatchNorm, which have CUDA kernels only."""
    if name == "batch_norm_stats":
        x, eps = args
        x = x.float().transpose(0, 1).flatten(1)
        return x.mean(1), torch.rsqrt(x.var(1, correction=0) + eps)
    if name == "batch_norm_gather_stats_with_counts":
        _, means, invstds, running_mean, running_var, momentum, eps, counts = args
        n, c = counts.sum(), counts[:, None]
        mean = (means * c).sum(0) / n
        variance = ((invstds**-2 - eps + means**2) * c).sum(0) / n - mean**2
        if running_mean is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * n / (n - 1), momentum)
        return mean, torch.rsqrt(variance + eps)
    if name == "batch_norm_elemt":
        x, weight, bias, mean, invstd, _ = args
        shape = [1, -1] + [1] * (x.ndim - 2)
        return ((x.float() - mean.view(shape)) * (invstd * weight).view(shape) + bias.view(shape)).to(x.dtype)
    if name == "batch_norm_backward_reduce":
        dy, x, mean, invstd, _, input_g, weight_g, bias_g = args
        axes, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        sum_dy, sum_dy_xmu = dy.float().sum(axes), (dy.float() * (x.float() - mean.view(shape))).sum(axes)
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()
    if name == "batch_norm_backward_elemt":
        dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts = args
        n, shape = counts.sum(), [1, -1] + [1] * (x.ndim - 2)
        mean, invstd, sum_dy, sum_dy_xmu = (t.view(shape) for t in (mean, invstd, sum_dy, sum_dy_xmu))
        centred = (x.float() - mean) * invstd**2 * sum_dy_xmu / n
        return ((dy.float() - sum_dy / n - centred) * invstd * weight.view(shape)).to(x.dtype)
    raise NotImplementedError(name)


class NotDistributed(torch.nn.Module):
    """In place of DistributedDataParallel, whose reducer hangs on the engine: the module, and the arguments' checks."""

    def __init__(self, module, device_ids=None, **options):
        super().__init__()
        self.module = module
        off = [n for n, p in module.named_parameters() if not isinstance(p, CudaTensor)]
        if device_ids not in (None, [0]) or off:
            raise RuntimeError(f"device_ids {device_ids}; parameters that are not on the device: {off[:3]}")
        if not any(p.requires_grad for p in module.parameters()):
            raise RuntimeError("DistributedDataParallel is not needed: no parameter requires a gradient")

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)

    def no_sync(self):
        return contextlib.nullcontext()


@contextlib.contextmanager
def pretended_ranks(world: int):
    """Inside FakeCuda: this process is rank 0 of `world` ranks under NCCL that all have its data. Collectives check
    their tensors."""
    import torch.distributed as dist

    class Nccl:
        def _get_backend_name(self):
            return "nccl"

    started = []

    def check(*tensors):
        for t in tensors:
            if not isinstance(t, CudaTensor):
                raise RuntimeError(f"No backend type associated with device type {t.device.type}")
            if not t.is_contiguous():
                raise RuntimeError("Tensors must be contiguous")

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        check(tensor)
        _CURRENT[-1].collectives["all_reduce"] += 1
        if op == dist.ReduceOp.SUM:
            tensor.mul_(world)

    def all_gather(parts, tensor, group=None, async_op=False):
        check(tensor, *parts)
        _CURRENT[-1].collectives["all_gather"] += 1
        for part in parts:
            part.copy_(tensor)

    def all_gather_flat(out, tensor, group=None, async_op=False):
        check(tensor, out)
        _CURRENT[-1].collectives["all_gather"] += 1
        out.view(world, -1).copy_(tensor.reshape(1, -1).expand(world, -1))

    def broadcast(tensor, src=None, *args, **kwargs):
        check(tensor)
        _CURRENT[-1].collectives["broadcast"] += 1

    def all_gather_object(parts, item, group=None):
        _CURRENT[-1].collectives["all_gather_object"] += 1
        parts[:] = [item] * world

    def start(backend=None, *args, **kwargs):
        if backend != "nccl":
            raise RuntimeError(f"backend {backend} for CUDA tensors")
        started.append(True)

    names = {
        "is_initialized": lambda: bool(started),
        "init_process_group": start,
        "destroy_process_group": lambda *a: started.clear(),
        "get_world_size": lambda group=None: world if started else 1,
        "get_rank": lambda group=None: 0,
        "get_backend": lambda group=None: "nccl",
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "all_gather_single": all_gather_flat,
        "all_gather_into_tensor": all_gather_flat,
        "broadcast": broadcast,
        "all_gather_object": all_gather_object,
    }
    convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, value))
        import common.precision
        import common.run

        meet = mock.patch.object(common.run, "rendezvous", lambda *a, **k: iter([(dist.HashStore(), 0, world)]))
        stack.enter_context(meet)
        for module in (common.run, common.precision):
            stack.enter_context(mock.patch.object(module, "DistributedDataParallel", NotDistributed))
        synced = torch.nn.SyncBatchNorm
        options = {"convert_sync_batchnorm": lambda m, g=None: convert(synced, m, g or Nccl())}
        stack.enter_context(mock.patch.multiple(synced, **options))
        ranks = {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        stack.enter_context(mock.patch.dict(os.environ, {k: str(v) for k, v in ranks.items()}))
        stack.callback(common.run._STORE.clear)
        yield


def _dense(tensor: torch.Tensor) -> bool:
    """Without gaps or overlap, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _unwrap(value):
    return value.inner if isinstance(value, CudaTensor) else value


@torch.no_grad()
def walk_backward(root: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
    """root.backward() by calling the autograd graph's nodes one by one, in the engine's order (latest first)."""
    gpu = _CURRENT[-1]
    gpu.in_backward = True
    start, nodes, dependencies = root.grad_fn, {}, collections.Counter()
    pending = [start]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes[node] = node._sequence_nr() if hasattr(node, "_sequence_nr") else 0
        for following, _ in node.next_functions:
            if following is not None:
                dependencies[following] += 1
                pending.append(following)
    buffers: dict = {start: {root.output_nr: torch.ones_like(root) if gradient is None else gradient}}
    order, heap = iter(range(10**9)), []
    heapq.heappush(heap, (-nodes[start], next(order), start))
    try:
        while heap:
            _, _, node = heapq.heappop(heap)
            given = buffers.pop(node, {})
            if type(node).__name__ == "AccumulateGrad":
                if given:
                    variable, g = node.variable, given[0]
                    if variable.grad is None:
                        same = [a == b for a, b, n in zip(g.stride(), variable.stride(), variable.shape) if n > 1]
                        if not all(same):  # the engine gives a gradient its parameter's layout
                            g = torch.empty_like(variable, dtype=g.dtype).copy_(g)
                        variable.grad = g.detach()
                    else:
                        variable.grad += g
                continue
            inputs = [given.get(i) for i in range(len(node._input_metadata))]
            if not given:
                outputs = (None,) * len(node.next_functions)
            else:
                custom = isinstance(node, torch.autograd.function.BackwardCFunction)
                outputs = node.apply(*inputs) if custom else node(*inputs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, number), g in zip(node.next_functions, outputs):
                if following is None:
                    continue
                if g is not None:
                    expected = following._input_metadata[number] if following._input_metadata else None
                    if type(following).__name__ == "AccumulateGrad":
                        expected = following.variable
                    if expected is not None and tuple(g.shape) != tuple(expected.shape):
                        g = g.sum_to_size(tuple(expected.shape))
                    if expected is not None and g.dtype != expected.dtype:
                        g = g.to(expected.dtype)
                    if expected is not None and isinstance(g, CudaTensor) != (expected.device.type == "cuda"):
                        raise RuntimeError(f"{following}: gradient on the wrong device")
                    held = buffers.setdefault(following, {})
                    held[number] = g if number not in held else held[number] + g
                dependencies[following] -= 1
                if dependencies[following] == 0:
                    heapq.heappush(heap, (-nodes[following], next(order), following))
    finally:
        gpu.in_backward = False




# ---- Training steps --------------------------------------------------------------------------------------------------

STEP = ("load", "prepare", "forward", "backward", "optimizer", "after")


@contextlib.contextmanager
def phases(gpu: FakeCuda):
    """Names in `gpu.phase` what the training loop does (one of STEP; "" outside of a step), in `gpu.step` its step."""
    from common import data, precision, run

    micro_batches, forward, after_step = (
        data.TrainingData.micro_batches, precision.Precision.forward, run.Run.after_step,
    )  # fmt: skip

    def entering(phase, original):
        def wrapped(*args, **kwargs):
            gpu.phase = phase
            return original(*args, **kwargs)

        return wrapped

    def named_micro_batches(self):
        batches = micro_batches(self)
        while True:
            gpu.phase = "load"
            batch = next(batches, None)
            if batch is None:
                return
            gpu.phase = "prepare"
            yield batch

    @contextlib.contextmanager
    def named_forward(self, model):
        gpu.phase = "forward"
        with forward(self, model):
            yield

    def counted(*args):
        gpu.phase = "after"
        after_step(*args)
        gpu.phase, gpu.step = "", gpu.step + 1

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (data.TrainingData, "micro_batches", named_micro_batches),
            (precision.Precision, "forward", named_forward),
            (precision.Precision, "backward", entering("backward", precision.Precision.backward)),
            (precision.Precision, "step", entering("optimizer", precision.Precision.step)),
            (run.Run, "after_step", counted),
            (run.Run, "save", entering("save", run.Run.save)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def recurring(gpu: FakeCuda) -> collections.Counter:
    """What makes the host wait in training steps after the first, which fills caches: {what and where: how often}."""
    found = [e for e in gpu.waits if e.phase in STEP and e.step > 0]
    return collections.Counter(f"in {e.phase}: {e.kind} ({e.op} {e.detail}) at {e.where}" for e in found)


# ---- The table -------------------------------------------------------------------------------------------------------

MATMULS = set("mm addmm bmm baddbmm convolution convolution_backward cudnn_convolution".split())
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def training_step(script: str, model: str, batch: int, *flags: str) -> FakeCuda:
    """What one bf16 step of a script's model does on images that are on the device, shapes only: the second of two,
    with the recipe's optimizer, average of weights and stochastic depth."""
    from common.optim import EMA, make_optimizer
    from common.precision import Precision

    module = importlib.import_module(script)
    args, recipe, _ = module.parse_args(["--model", model, "--data", "imagenet", *flags])
    with FakeCuda("meta", keep_ops=True) as gpu:
        net = module.make_model(args, recipe, 1000).to("cuda", memory_format=torch.channels_last).train()
        optimizer = make_optimizer(recipe.optimizer, net, recipe.lr, recipe.weight_decay)
        precision = Precision("bf16", CUDA, clip_grad=recipe.clip_grad)
        ema = EMA(net, recipe.ema) if getattr(recipe, "ema", 0) else None
        images, labels = torch.empty(batch, 3, *recipe.img_size, device="cuda"), torch.zeros(batch, 1000, device="cuda")
        if script == "trex":
            local = torch.empty(batch, 3, *recipe.local_size, device="cuda")
            images, labels = [images] + [local] * recipe.local_crops, labels.repeat(1 + recipe.local_crops, 1)
        for _ in range(2):
            gpu.ops.clear()
            gpu.launches, gpu.peak, gpu.phase = 0, gpu.live, "forward"
            with precision.forward(net):
                loss = torch.nn.functional.cross_entropy(net(images), labels)
            gpu.phase = "backward"
            precision.backward(loss)
            gpu.phase = "optimizer"
            _, skipped = precision.step(optimizer, recipe.lr)
            gpu.phase = "average"
            if ema:
                ema.update(net, skip=skipped)
    return gpu


def moved(ops: list[Op]) -> float:
    """GB that operators read and write, were each a kernel of its own."""
    return sum(dtype.itemsize * math.prod(shape) for op in ops for dtype, shape in op.inputs + op.outputs) / 1e9


def main() -> None:
    print(f"{'':30s}{'launches':>10s}{'forward':>9s}{'backward':>9s}{'optimizer':>10s}{'average':>9s}"
          f"{'GB moved':>10s}{'GB casts':>9s}{'fp32 products':>14s}{'peak GiB':>10s}")
    for script, model, batch, *flags in (
        ("deit", "deit_b", 64), ("deit3", "vit_b", 64), ("deit3", "vit_h", 64, "--grad-checkpoint"),
        ("cait", "cait_s36", 64), ("resmlp", "resmlp_s24", 64), ("patchconvnet", "patchconvnet_s60", 64),
        ("trex", "resnet50", 32),
    ):  # fmt: skip
        gpu = training_step(script, model, batch, *flags)
        phases = [sum(op.phase == name for op in gpu.ops) for name in ("forward", "backward", "optimizer", "average")]
        other = [op for op in gpu.ops if op.name not in MATMULS and op.name not in (ATTENTION, ATTENTION + "_backward")]
        casts = [op for op in other if op.name == "_to_copy" and op.inputs[0][0] != op.outputs[0][0]]
        wide = sum(op.name in MATMULS and op.inputs[0][0] == torch.float32 for op in gpu.ops)
        print(f"{f'{model}, batch {batch}':30s}{len(gpu.ops):10d}{phases[0]:9d}{phases[1]:9d}{phases[2]:10d}"
              f"{phases[3]:9d}{moved(other):10.1f}{moved(casts):9.1f}{wide:14d}{gpu.peak / 2**30:10.2f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
