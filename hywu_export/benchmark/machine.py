"""The machine that figures were measured on: what must be known to compare them, and what spoils them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = (
    "hywu-export",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "tokenizers",
)
_CPU = "sys/devices/system/cpu"


@dataclass
class Machine:
    """``root`` stands for ``/``; commands are asked for on the real one alone."""

    root: Path = field(default_factory=lambda: Path("/"))

    def record(self) -> dict[str, Any]:
        """Everything that does not change while something runs; what is not known is left out."""
        found: dict[str, Any] = {
            "system": platform.platform(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "cpu": self.cpu(),
            "processors": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "memory": self._memory(),
            "governor": self._text(f"{_CPU}/cpu0/cpufreq/scaling_governor"),
            "platform_profile": self._text("sys/firmware/acpi/platform_profile"),
            "power": self._power(),
            "jetson": self.jetson(),
            "packages": _packages(),
        }
        return {key: value for key, value in found.items() if value not in (None, {}, [])}

    def state(self) -> dict[str, Any]:
        """What changes: clocks in MHz, temperatures in °C, throttling, load."""
        clocks = [self._number(p) for p in self.root.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq")]
        throttled = [
            self._number(p) for p in self.root.glob(f"{_CPU}/cpu[0-9]*/thermal_throttle/core_throttle_count")
        ]
        known = [clock / 1000 for clock in clocks if clock is not None]
        load = (self._text("proc/loadavg") or "").split()
        found: dict[str, Any] = {
            "cpu_mhz": {"min": min(known), "max": max(known)} if known else None,
            "temperatures": self._temperatures(),
            "throttle_events": int(sum(t for t in throttled if t is not None)) if throttled else None,
            "load": float(load[0]) if load else None,
        }
        return {key: value for key, value in found.items() if value not in (None, {}, [])}

    def cpu(self) -> str | None:
        """The processor's name."""
        text = self._text("proc/cpuinfo") or ""
        match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
        return (
            match.group(1).strip() if match else self._text("proc/device-tree/model") or platform.processor()
        )

    def busy(self) -> float | None:
        """Seconds that all processors together have worked, for all processes."""
        fields = (self._text("proc/stat") or "").split("\n", 1)[0].split()
        if len(fields) < 9:
            return None
        user, nice, system, _, _, irq, softirq, _ = map(int, fields[1:9])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    def jetson(self) -> dict[str, Any] | None:
        """Model, L4T, power mode and clocks of a Jetson; None elsewhere."""
        release = self._text("etc/nv_tegra_release")
        if release is None:
            return None
        match = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", release)
        model = self._text("proc/device-tree/model") or self._text("sys/firmware/devicetree/base/model")
        found: dict[str, Any] = {
            "model": model.strip("\0") if model else None,
            "l4t": f"{match.group(1)}.{match.group(2)}" if match else release.split("\n", 1)[0],
            "nvpmodel": _first(self._command("nvpmodel", "-q"), r"NV Power Mode:\s*(\S+)"),
            "jetson_clocks": self._locked(),
            "gpu_mhz": self._gpu_clock(),
        }
        return {key: value for key, value in found.items() if value is not None}

    def _locked(self) -> bool | None:
        """Whether jetson_clocks has set every processor's smallest clock to the largest."""
        pairs = [
            (self._number(path), self._number(path.with_name("scaling_max_freq")))
            for path in self.root.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_min_freq")
        ]
        return all(low == high for low, high in pairs) if pairs else None

    def _gpu_clock(self) -> float | None:
        for path in sorted(self.root.glob("sys/class/devfreq/*gpu*/cur_freq")):
            value = self._number(path)
            if value is not None:
                return value / 1e6
        return None

    def _temperatures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for zone in sorted(self.root.glob("sys/class/thermal/thermal_zone*")):
            name, value = self._text(zone / "type"), self._number(zone / "temp")
            if name and value is not None and -50e3 < value < 200e3:
                found[name] = value / 1000
        return found

    def _power(self) -> str | None:
        """``battery`` where one is being emptied, ``mains`` where there is one that is not."""
        states = [self._text(p) for p in self.root.glob("sys/class/power_supply/BAT*/status")]
        if not states:
            return None
        return "battery" if "Discharging" in states else "mains"

    def _memory(self) -> int | None:
        match = re.search(r"^MemTotal:\s*(\d+) kB", self._text("proc/meminfo") or "", re.MULTILINE)
        return int(match.group(1)) * 1024 if match else None

    def _text(self, path: str | Path) -> str | None:
        try:
            return (self.root / path).read_text(errors="replace").strip() or None
        except OSError:
            return None

    def _number(self, path: str | Path) -> float | None:
        try:
            return float(self._text(path) or "")
        except ValueError:
            return None

    def _command(self, *command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout


def suspicions(machine: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What about the machine makes figures doubtful."""
    found = []
    if machine.get("power") == "battery":
        found.append("the machine runs on its battery")
    if machine.get("governor") == "powersave" and machine.get("jetson") is not None:
        found.append("the CPU governor is powersave")
    if machine.get("platform_profile") in ("low-power", "quiet"):
        found.append(f"the platform profile is {machine['platform_profile']}")
    if after.get("throttle_events", 0) > before.get("throttle_events", 0):
        found.append("the CPU was slowed down because of its temperature")
    if before.get("load", 0.0) > 0.5:
        found.append(f"the load of the machine was {before['load']:.1f} before the measurement began")
    jetson = machine.get("jetson")
    if jetson is not None:
        if jetson.get("jetson_clocks") is False:
            found.append("jetson_clocks is not set: clocks follow the load")
        mode = jetson.get("nvpmodel")
        if mode is not None and not mode.startswith("MAXN"):
            found.append(f"the power mode is {mode}, not MAXN")
    return found


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _first(text: str, pattern: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None
