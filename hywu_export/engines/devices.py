"""Which GPU takes which engine: compute capabilities, and the precisions that they compute in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hywu_runtime.errors import UnsupportedError

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX builds for."""

_OTHER_CAPABILITIES = {
    "8.7": "Jetson Orin",
    "9.0": "H100, H200 and GH200",
    "10.0": "B200 and GB200",
    "10.1": "Jetson Thor",
    "10.3": "B300 and GB300",
    "11.0": "Jetson Thor",
}
"""Devices of TensorRT that TensorRT-RTX does not know."""

TURING = "7.5"


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine."""

    name: str
    capability: str


def parse_capabilities(text: str) -> tuple[str, ...]:
    """``"86,8.9"`` as ``("8.6", "8.9")``: sorted, each once.

    Raises:
        UnsupportedError: one of them is no compute capability of a GPU that any TensorRT runs on.
    """
    found = {_parse(part.strip()) for part in text.split(",")}
    return tuple(sorted(found, key=_number))


def check_rtx(capabilities: Sequence[str]) -> None:
    """Refuses capabilities that TensorRT-RTX does not build for.

    Raises:
        UnsupportedError: naming the devices and the TensorRT that they take.
    """
    for capability in capabilities:
        if capability in _OTHER_CAPABILITIES:
            raise UnsupportedError(
                f"TensorRT-RTX does not run on compute capability {capability} "
                f"({_OTHER_CAPABILITIES[capability]})",
                f"TensorRT-RTX builds for {', '.join(RTX_CAPABILITIES)}",
                "Build with --backend tensorrt on that device, or write a script for it with "
                "--backend tensorrt --emit-script FILE",
            )


def gpu() -> Gpu | None:
    """The GPU that the driver lists first (CUDA_VISIBLE_DEVICES chooses); None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    name, device = ctypes.create_string_buffer(256), ctypes.c_int()
    numbers = [ctypes.c_int(), ctypes.c_int()]
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(numbers[0]), major, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(numbers[1]), minor, device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(errors="replace"), f"{numbers[0].value}.{numbers[1].value}")


def _parse(text: str) -> str:
    digits = text.removeprefix("sm_").removeprefix("SM")
    capability = digits if "." in digits else f"{digits[:-1]}.{digits[-1:]}"
    if capability not in (*RTX_CAPABILITIES, *_OTHER_CAPABILITIES):
        raise UnsupportedError(
            f"{text!r} is no compute capability that is known here",
            f"Expected some of {', '.join(_compact(RTX_CAPABILITIES))} for TensorRT-RTX",
            "Look yours up with `nvidia-smi --query-gpu=compute_cap --format=csv`",
        )
    return capability


def _compact(capabilities: Iterable[str]) -> list[str]:
    return [capability.replace(".", "") for capability in capabilities]


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)
