"""Which device, and in which precision the forward pass runs."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Literal

from utils.errors import Refused

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def pick_device(name: str) -> torch.device:
    """``auto`` | ``cpu`` | ``cuda`` | ``cuda:n`` as a device that is really there, or ``Refused``.

    Under ``torchrun`` a plain ``cuda`` (or ``auto``) is the GPU of this process's local rank.
    """
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise Refused(f"--device is '{name}', expected auto, cpu, cuda or cuda:0, cuda:1 ...")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise Refused(f"--device {name}: no usable CUDA device here, use --device cpu")
    number = int(index or os.environ.get("LOCAL_RANK", "0"))
    if number >= found:
        raise Refused(f"--device {name}: GPU {number} was asked for, {found} found "
                      f"(0 to {found - 1})")
    return torch.device("cuda", number)


def check_precision(precision: Precision, device: torch.device) -> None:
    """``Refused`` when the device cannot compute in this precision."""
    import torch

    if precision == "fp16" and device.type != "cuda":
        raise Refused("--precision fp16 needs CUDA: use bf16 or fp32 on the CPU")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refused("--precision bf16 is not supported by this GPU: use fp16 or fp32")


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context in which a forward pass runs; does nothing in fp32."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors give back, for the next ones.

    The C library returns every large block to the system, which then clears it page by page when
    it is asked for again: half of the time of training an encoder on a CPU. Does nothing where the
    library is not glibc.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2**30)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
