"""Compiles a Triton kernel for Hopper (sm_90) where its launcher would launch it; no GPU is used.

Arguments are specialised as Triton does: an int of 1 becomes a constant, multiples of 16 are promised so.
TRITON_INTERPRET must not be set in the process.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

HOPPER = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTERS = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
}


class CompilerInsteadOfLaunch:
    """Stands where a kernel stands in its module; `shared_bytes` is what the last launch would take."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.shared_bytes = -1

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: object, **kwargs: Any) -> None:
        """Compile for these arguments as if the tensors lay on a GPU."""
        names = self.kernel.arg_names
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], object] = {}
        attributes: dict[tuple[int, ...], list[list[object]]] = {}
        values = dict(zip(names, args, strict=False)) | kwargs
        for index, name in enumerate(names):
            general = self.kernel.params[index].do_not_specialize
            kind, aligned = specialise(values[name], constexpr=name in kwargs, general=general)
            signature[name] = kind
            if kind == "constexpr":
                constants[(index,)] = values[name]
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        make = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        source = make(self.kernel, signature, constexprs=constants, attrs=attributes)
        self.shared_bytes = triton.compile(source, target=HOPPER, options=options).metadata.shared


def specialise(value: object, *, constexpr: bool, general: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is a multiple of 16; `general`: do not look at it."""
    if constexpr or (isinstance(value, int) and value == 1 and not general):
        return "constexpr", False
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not general
