"""The C++ core's answers to questions, see runtime/tests/core/probe.cpp."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class Probe:
    """Asks `hywu_core_probe` one question after the other."""

    def __init__(self, path: Path):
        self._process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, command: str, **question: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"command": command, **question}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the probe ended with {process.wait()} on {command} {question}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> int:
        self._process.communicate()
        return self._process.returncode
