"""Energy and memory, where something measures them: NVML, the INA3221 of a Jetson, RAPL."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

PERIOD = 0.05  # seconds between two readings of power


class Meter(Protocol):
    """Counts energy. ``name`` says which, ``what`` of."""

    name: str
    what: str

    def joules(self) -> float:
        """A counter: differences are energy."""
        ...


class Ina3221:
    """The input rail of a Jetson (VDD_IN): power in milliwatts, integrated by a thread."""

    name, what = "ina3221", "module"

    def __init__(self, volts: Path, amperes: Path):
        self._volts, self._amperes = volts, amperes
        self._joules, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    @classmethod
    def find(cls, root: Path) -> Ina3221 | None:
        for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
            with contextlib.suppress(OSError):
                if label.read_text().strip() in ("VDD_IN", "SYS_5V0", "VDD_TOTAL"):
                    number = label.name.removeprefix("in").removesuffix("_label")
                    return cls(label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
        return None

    def watts(self) -> float:
        return float(self._volts.read_text()) * float(self._amperes.read_text()) / 1e6

    def joules(self) -> float:
        return self._joules

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _count(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(PERIOD):
            now = time.perf_counter()
            with contextlib.suppress(OSError, ValueError):
                self._joules += self.watts() * (now - last)
            last = now


class Rapl:
    """The energy counter of an Intel or AMD package; often readable by root alone."""

    name, what = "rapl", "CPU package"

    def __init__(self, counter: Path, limit: float):
        self._counter, self._limit = counter, limit
        self._last, self._sum = self._read(), 0.0

    @classmethod
    def find(cls, root: Path) -> Rapl | None:
        for zone in sorted(root.glob("sys/class/powercap/intel-rapl:[0-9]")):
            with contextlib.suppress(OSError, ValueError):
                return cls(zone / "energy_uj", float((zone / "max_energy_range_uj").read_text()))
        return None

    def joules(self) -> float:
        now = self._read()
        self._sum += (now - self._last) % self._limit  # the counter wraps
        self._last = now
        return self._sum / 1e6

    def _read(self) -> float:
        return float(self._counter.read_text())


class Nvml:
    """A GPU by NVIDIA's management library, through the package ``nvidia-ml-py``."""

    name, what = "nvml", "GPU"

    def __init__(self, device: int):
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._device = pynvml.nvmlDeviceGetHandleByIndex(device)

    @classmethod
    def find(cls, device: int) -> Nvml | None:
        try:
            return cls(device)
        except Exception:  # not installed, no driver, no such GPU: there is no meter
            return None

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1000

    def record(self) -> dict[str, Any]:
        """Name, driver, clocks in MHz, temperature, memory in use by this process and in all, and what slows
        it."""
        nvml, device, found = self._nvml, self._device, dict[str, Any]()

        def note(key: str, ask: Any) -> None:
            with contextlib.suppress(Exception):  # many questions have no answer on some GPUs
                value = ask()
                found[key] = value.decode() if isinstance(value, bytes) else value

        note("name", lambda: nvml.nvmlDeviceGetName(device))
        note("driver", nvml.nvmlSystemGetDriverVersion)
        note("sm_mhz", lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM))
        note("memory_mhz", lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM))
        note("temperature", lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))
        note("watts", lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000)
        note("watts_limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000)
        note("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(device).total)
        note("slowed", lambda: self._slowed())
        processes: list[Any] = []
        with contextlib.suppress(Exception):
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
            found["other_processes"] = sum(p.pid != os.getpid() for p in processes)
            found["memory_used"] = sum(p.usedGpuMemory or 0 for p in processes if p.pid == os.getpid())
        return found

    def _slowed(self) -> list[str]:
        reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device)
        known = {
            "SwPowerCap": "power limit", "HwSlowdown": "hardware", "SwThermalSlowdown": "temperature",
            "HwThermalSlowdown": "temperature", "HwPowerBrakeSlowdown": "power brake",
        }  # fmt: skip
        return sorted(
            {
                text
                for name, text in known.items()
                if reasons & getattr(self._nvml, f"nvmlClocksThrottleReason{name}", 0)
            }
        )


@contextmanager
def energy_meters(device: int | None, root: Path | None = None) -> Iterator[list[Meter]]:
    """Every meter that works here; that of a GPU only if ``device`` is one."""
    at = root or Path("/")
    gpu = None if device is None else Nvml.find(device)
    found: list[Any] = [gpu, Ina3221.find(at), Rapl.find(at)]
    meters: list[Meter] = []
    for meter in found:
        if meter is not None:
            with contextlib.suppress(Exception):  # the counter itself may not be there
                meter.joules()
                meters.append(meter)
    try:
        yield meters
    finally:
        for meter in meters:
            if isinstance(meter, Ina3221):
                meter.close()


def peak_memory() -> int:
    """The largest resident memory of the process so far, in bytes; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def resident_memory() -> int:
    """Resident memory now, in bytes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
