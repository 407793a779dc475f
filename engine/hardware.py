"""Where an encoder computes, and in which numbers."""

from __future__ import annotations

import torch

from embell.errors import EncoderError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | None) -> torch.device:
    """The device that was named, else a GPU if there is one.

    Raises EncoderError if it cannot be used here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if target.type == "meta":
        raise EncoderError("device 'meta' holds no numbers; give cpu or cuda")
    return target


def other_devices(device: torch.device) -> list[torch.device]:
    """The graphics cards of this machine beside the one picked, empty on a CPU."""
    if device.type != "cuda":
        return []
    first = torch.cuda.current_device() if device.index is None else device.index
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if index != first]


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype that was named, else bf16 where the hardware computes in it.

    Raises EncoderError for an unknown name.
    """
    if dtype is not None:
        if dtype not in _DTYPES:
            raise EncoderError(f"unknown dtype {dtype!r}; known are {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16), by capability, not by name."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
