"""The library of fused CPU ops (kernels/ort): where it is, and its kernels for torch through ctypes.

It is built with the package where a C++ compiler is (setup.py); everything works without it, only slower.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent / "ort"
NAME = "libcompressor_ops" + (".dylib" if sys.platform == "darwin" else ".so")
MISSING = "was not built; install g++ or clang++, then: pip install --force-reinstall --no-deps compressor"


def path() -> Path:
    """The library's file. Raises CompressorError where it was not built."""
    file = FOLDER / NAME
    if not file.is_file():
        raise CompressorError(f"the library of fused CPU ops, {file}, {MISSING}; models run without it, only slower.")
    return file.resolve()


def register_ops(session_options: Any) -> None:
    """Let sessions made with these `onnxruntime.SessionOptions` run our nodes with the fused kernels.

    Raises CompressorError where the library is missing or this onnxruntime refuses it; sessions of options on which
    it was not registered run the nodes' function bodies.
    """
    file = path()
    try:
        session_options.register_custom_ops_library(str(file))
    except Exception as error:
        reason = str(error).rpartition(" : ")[2].strip().rstrip(".")
        raise CompressorError(
            f"onnxruntime refuses {file.name}: {reason}; models run without it through their function bodies."
        ) from error


@cache
def library() -> ctypes.CDLL:
    """Loaded once. Raises CompressorError where it is missing or cannot be loaded."""
    file = path()
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise CompressorError(f"{file} cannot be loaded ({error}); install compressor again.") from error
    loaded.compressor_isa.restype = ctypes.c_char_p
    loaded.compressor_create.restype = ctypes.c_void_p
    loaded.compressor_create.argtypes = [
        ctypes.c_char_p, _Strings, _Strings, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t,
    ]  # fmt: skip
    loaded.compressor_run.argtypes = [
        ctypes.c_void_p, ctypes.POINTER(_Tensor), ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int,
        ctypes.c_char_p, ctypes.c_size_t,
    ]  # fmt: skip
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.compressor_gptq.argtypes = [*[pointer] * 3, number, number, *[pointer] * 3, ctypes.c_int]
    return loaded


def isa() -> str:
    """The instruction set that its kernels use on this processor: avx512vnni, avx2 or portable."""
    return str(library().compressor_isa().decode())


def use_isa(name: str) -> bool:
    """Use another one from here on, for tests; False where this processor does not have it."""
    return bool(library().compressor_use_isa(name.encode()))


_Strings = ctypes.POINTER(ctypes.c_char_p)
_MESSAGE_BYTES = 512


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


@cache
def _kernel(op: str, attributes: tuple[tuple[str, str], ...]) -> int:
    names, values = [name for name, _ in attributes], [value for _, value in attributes]
    strings = ctypes.c_char_p * len(attributes)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    made = library().compressor_create(
        op.encode(), strings(*(n.encode() for n in names)), strings(*(v.encode() for v in values)), len(attributes),
        message, _MESSAGE_BYTES,
    )  # fmt: skip
    if not made:
        raise CompressorError(message.value.decode())
    return int(made)


def run(
    op: str,
    attributes: dict[str, str | int],
    inputs: Sequence[Tensor | None],
    shape: tuple[int, ...],
    threads: int | None = None,
) -> Tensor:
    """The float32 output, of this shape, of a node of this op: its attributes and inputs (exporters/onnx_nodes.py).

    At most `threads` threads, torch's number where None. Raises CompressorError for what the op does not read.
    """
    import torch

    types = {
        torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7,
        torch.bfloat16: 16, torch.float8_e4m3fn: 17, torch.float8_e5m2: 19,
    }  # fmt: skip
    given, held = (_Tensor * len(inputs))(), []
    for slot, tensor in zip(given, inputs, strict=True):
        if tensor is None:
            continue
        held.append(tensor := tensor.detach().contiguous())
        slot.data = tensor.data_ptr() or ctypes.addressof(given)  # an empty tensor has no address
        slot.type, slot.rank = types.get(tensor.dtype, 0), tensor.dim()
        slot.shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
    y = torch.empty(shape)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    kernel = _kernel(op, tuple((name, str(value)) for name, value in attributes.items()))
    done = library().compressor_run(
        kernel, given, len(inputs), y.data_ptr(), y.numel(), threads or torch.get_num_threads(), message, _MESSAGE_BYTES
    )
    if not done:
        raise CompressorError(message.value.decode())
    return y


def linear(op: str, attributes: dict[str, str | int], x: Tensor, inputs: Sequence[Tensor | None], rows: int) -> Tensor:
    """y [..., rows] in the dtype of x; `inputs` are those behind x. Scales and biases become float32."""
    import torch

    halves = (torch.bfloat16, torch.float16, torch.float64)
    given = [t.float() if t is not None and t.dtype in halves else t for t in (x, *inputs)]
    return run(op, attributes, given, (*x.shape[:-1], rows)).to(x.dtype)


def gptq_block(
    weight: Tensor, step: Tensor, u: Tensor, limits: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """(codes, errors), each [N, C] float32, of a block of C <= 128 columns: methods/gptq.py, round_block.

    weight, step [N, C], u [C, C] float32 on the CPU; limits of the element grid as in methods/grid.py.
    """
    import torch

    weight, step, u = weight.contiguous(), step.contiguous(), u.contiguous()
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    pointers = [t.data_ptr() for t in (weight, step, u)]
    done = library().compressor_gptq(
        *pointers, *weight.shape, (ctypes.c_float * 4)(*limits), codes.data_ptr(), errors.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise ValueError(f"a block has at most 128 columns, got {weight.shape[1]}.")
    return codes, errors


@cache
def built() -> bool:
    return (FOLDER / NAME).is_file()


def op(name: str, reference: Callable[..., Tensor], fused: Callable[..., Tensor]) -> Any:
    """The torch op compressor::`name` with the signature of `reference`, which it runs; on a CPU `fused`, of the same
    arguments, where the library was built."""
    import torch

    made = torch.library.custom_op(f"compressor::{name}", reference, mutates_args=())
    made.register_kernel("cpu")(lambda *given: (fused if built() else reference)(*given))
    return made
