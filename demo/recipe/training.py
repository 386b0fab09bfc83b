"""What both trainings share: reproducible steps and checkpoints that survive being killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """Saves modules, optimiser and step every ``every`` seconds, atomically, and resumes from it."""

    def __init__(self, path: Path, parts: Mapping[str, Any], every: float = 120.0):
        self.path, self.parts, self.every = path, parts, every
        self.saved_at = time.monotonic()

    def resume(self) -> int:
        """Load what is there; return the next step."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def save(self, step: int, force: bool = False) -> None:
        if not force and time.monotonic() - self.saved_at < self.every:
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "step": step}, temporary)
        os.replace(temporary, self.path)
        self.saved_at = time.monotonic()


def run(
    steps: int,
    step: Callable[[int], dict[str, float]],
    checkpoint: Checkpoint,
    report_every: int = 50,
) -> None:
    """Call ``step(i)`` for the steps that are left, printing averages; ``step`` seeds itself with ``i``."""
    sums: dict[str, float] = {}
    first = checkpoint.resume()
    started = time.monotonic()
    for i in range(first, steps):
        for name, value in step(i).items():
            sums[name] = sums.get(name, 0.0) + value
        if (i + 1) % report_every == 0:
            pace = (time.monotonic() - started) / (i + 1 - first)
            figures = "  ".join(f"{name} {value / report_every:.5f}" for name, value in sums.items())
            print(f"step {i + 1}/{steps}  {figures}  {pace:.2f} s/step", flush=True)
            sums.clear()
        checkpoint.save(i + 1)
    checkpoint.save(steps, force=True)
