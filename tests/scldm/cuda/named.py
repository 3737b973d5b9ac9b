"""A GPU by name: whole steps run over tensors that have a device, a shape and no storage, on a machine without a GPU.

What is wrong on a GPU for want of care shows: tensors of two devices in one operation, kernels that are launched in
vain, and everything for which the host waits.
Reading order: build, pretend; Watch, watched; sdpa_as_on_a_gpu.
"""

from __future__ import annotations

import collections
import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MEMORY = 80_000_000_000
FEW = 10_000


def build(folder: Path) -> Path:
    """Compile guard.cpp against this torch; two seconds."""
    import torch

    of_torch, library = Path(torch.__file__).parent, folder / "guard.so"
    include = [f"-I{of_torch / path}" for path in ("include", "include/torch/csrc/api/include")]
    linked = [f"-L{of_torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{of_torch / 'lib'}"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", *include, str(HERE / "guard.cpp"), "-o", str(library), *linked]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def pretend(library: Path) -> None:
    """From now on this process believes in an H100 of 80 GB. Before torch is imported."""
    assert "torch" not in sys.modules, "torch asks once whether there is a GPU"
    import importlib.util

    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    place = Path(spec.origin).parent
    for name in (*sorted(place.parent.glob("torch.libs/libgomp*")), *sorted(place.glob("lib/libgomp*"))):
        ctypes.CDLL(str(name), ctypes.RTLD_GLOBAL)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(place / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

    import torch

    there = SimpleNamespace(
        total_memory=MEMORY, multi_processor_count=132, name="NVIDIA H100 80GB HBM3", major=9, minor=0
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "current_device": 0,
        "device_count": 1,
        "is_bf16_supported": True,
        "get_device_capability": (9, 0),
        "get_device_name": there.name,
        "get_device_properties": there,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    import torch.cuda.amp.common as amp

    amp.amp_definitely_not_available = lambda: False


# --- what is counted -----------------------------------------------------------------------------------------------


def line_of_ours() -> str:
    """Where in this checkout's packages an operation was asked for."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and "/tests/" not in path and "site-packages" not in path:
            return f"{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


class Counts:
    """kernels: launches, but for views and fresh memory; waits: what the host waits for, and on which line of ours;
    sdpa: which of torch's attention kernels were taken."""

    def __init__(self) -> None:
        self.kernels = 0
        self.waits: collections.Counter[str] = collections.Counter()
        self.sdpa: collections.Counter[str] = collections.Counter()
        self.by_line: collections.Counter[str] = collections.Counter()

    def launched(self) -> None:
        self.kernels += 1
        self.by_line[line_of_ours()] += 1

    def waited(self, what: str) -> None:
        self.waits[f"{what} at {line_of_ours()}"] += 1


ACTIVE: list[Counts] = []
NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "set_")
MASKS = ("index", "index_put", "index_put_", "_index_put_impl_")


def watch_mode() -> Any:
    """The dispatch mode that counts into the innermost of ACTIVE."""
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def on_gpu(x: Any) -> bool:
        return isinstance(x, Tensor) and x.device.type == "cuda"

    def found(name: str, args: tuple, kwargs: dict, counts: Counts) -> Any:
        """What an operation gives whose shape or value depends on numbers, which there are none of."""
        x = args[0]
        if name == "_local_scalar_dense":
            if on_gpu(x):
                counts.waited("a number")
            return 1.0 if x.is_floating_point() else 0
        if on_gpu(x):
            counts.waited(name)
        if name == "nonzero":  # one in twenty, and none of few: what is tried again while some are left comes to an end
            n = x.numel() // 20 if x.numel() > FEW else 0
            return torch.empty(n, x.ndim, dtype=torch.int64, device=x.device)
        if name == "bincount":
            return torch.empty(kwargs.get("minlength") or 1, dtype=torch.int64, device=x.device)
        assert name == "repeat_interleave", name
        return torch.empty(max(1, x.numel() // 2), dtype=torch.int64, device=x.device)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs, counts, name = kwargs or {}, ACTIVE[-1], func._overloadpacket.__name__
            unknown = name in ("_local_scalar_dense", "nonzero", "bincount")
            if unknown or (name == "repeat_interleave" and kwargs.get("output_size") is None):
                return found(name, args, kwargs, counts)
            if name in MASKS:
                of = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
                if any(map(on_gpu, of)):
                    counts.waited("a mask")
                if of:
                    some = torch.empty(of[0].numel() // 20, dtype=torch.int64, device=of[0].device)
                    args = (args[0], [some if i is of[0] else i for i in args[1]], *args[2:])
            if name in ("masked_select", "unique_dim", "_unique2", "unique_consecutive") and on_gpu(args[0]):
                counts.waited(name)
            if name in ("_to_copy", "copy_"):
                source, target = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
                elsewhere = target is not None and source.device.type != torch.device(target).type
                if elsewhere and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2])):
                    counts.waited(f"a copy from {source.device.type} to {torch.device(target).type}")
            out = func(*args, **kwargs)
            is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            is_kernel = not is_view and name not in NO_KERNEL and func.namespace != "prim" and "sym_" not in name
            if is_kernel and any(map(on_gpu, tree_leaves((args, kwargs, out)))):
                counts.launched()
            return out

    return Watch()


@contextmanager
def watched() -> Iterator[Counts]:
    """Within, what runs on the GPU is counted."""
    counts = Counts()
    with watch_mode():
        ACTIVE.append(counts)
        try:
            yield counts
        finally:
            ACTIVE.pop()


def without_storage() -> Any:
    """The mode in which tensors have none; and what of torch and numpy would look into them gives zeros."""
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    make = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        out = make(data, *args, **kwargs)
        if device is None or torch.device(device).type == "cpu":
            return out
        if ACTIVE:
            ACTIVE[-1].waited("a copy from Python")
        return torch.empty(out.shape, dtype=out.dtype, device=device)

    def numbers(x: Any, dtype: Any) -> Any:
        if x.device.type == "cuda":
            ACTIVE[-1].waited("a copy to Python")
        return np.zeros(tuple(x.shape), dtype) if x.dtype != torch.bool else np.ones(tuple(x.shape), dtype)

    replaced: dict[str, Callable[..., Any]] = {
        "tolist": lambda x: numbers(x, str(x.dtype).removeprefix("torch.").replace("bfloat16", "float32")).tolist(),
        "numpy": lambda x: numbers(x, str(x.dtype).removeprefix("torch.").replace("bfloat16", "float32")),
    }
    for name, f in replaced.items():
        setattr(torch.Tensor, name, f)
        setattr(FakeTensor, name, f)
    torch.nn.Module.to = where_it_lies
    torch.tensor = tensor
    torch.from_numpy = lambda x: torch.empty(x.shape, dtype=make(x[:0].copy()).dtype)
    torch.nn.functional.scaled_dot_product_attention = sdpa_as_on_a_gpu
    return FakeTensorMode(allow_non_fake_inputs=False)


def where_it_lies(self: Any, device: Any) -> Any:
    """`Module.to`, which can't move what has no storage: networks are made on the GPU."""
    assert all(x.device.type == device.type for x in (*self.parameters(), *self.buffers()))
    return self


def sdpa_as_on_a_gpu(q: Any, k: Any, v: Any, attn_mask: Any = None) -> Any:
    """`scaled_dot_product_attention` by the kernel that torch takes on a GPU of compute capability 9.0.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.13. All want four axes and equal batches and
    heads; flash attention half precision, no mask and heads of at most 256 channels; memory-efficient attention rows of
    a multiple of 16 bytes. What is left is the formula, which writes scores.
    """
    import torch

    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    H, ops = q.shape[-1], torch.ops.aten
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    fits = (
        q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.dtype == k.dtype == v.dtype
    )
    if fits and is_half and attn_mask is None and H <= 256 and H % 8 == 0:
        ACTIVE[-1].sdpa["flash"] += 1
        return ops._scaled_dot_product_flash_attention(q, k, v)[0]
    if fits and H * q.element_size() % 16 == 0:
        ACTIVE[-1].sdpa["efficient"] += 1
        bias = None
        if attn_mask is not None:
            bias = torch.empty(*q.shape[:3], k.shape[2], dtype=q.dtype, device=q.device)
        return ops._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]
    ACTIVE[-1].sdpa["formula"] += 1
    return ops._scaled_dot_product_attention_math(q, k, v, attn_mask)[0]
