"""The command line, ``hywu``. One file per command; what is heavy is imported inside the commands."""

from __future__ import annotations

from hywu_export.cli.app import hywu, main

__all__ = ["hywu", "main"]
