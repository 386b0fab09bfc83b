"""How far a job is: stages with the share of the work that they are expected to be."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
Stage = Callable[[int, int], None]
_PARTS = 1000


class Work:
    """Turns the progress of stages into that of the whole.

    Args:
        shares: stage to its expected share of the work, in any unit.
        tell: called with (what, done, total).
    """

    def __init__(self, shares: dict[str, float], tell: Progress | None):
        self._shares, self._tell = shares, tell or (lambda what, done, total: None)
        self._total = sum(shares.values()) or 1.0
        self._before = 0.0
        self._current: str | None = None
        self._part = (0.0, 1.0)

    def stage(self, name: str, part: int = 0, parts: int = 1) -> Stage:
        """The progress of a stage, or of one of its equal parts; what came before it is taken to be done."""
        if name != self._current:
            self._current = name
            self._before = sum(list(self._shares.values())[: list(self._shares).index(name)])
        share = self._shares[name] / parts
        start = self._before + part * share

        def progress(done: int, total: int) -> None:
            reached = start + share * done / max(total, 1)
            self._tell(name, round(_PARTS * reached / self._total), _PARTS)

        progress(0, 1)
        return progress

    def done(self) -> None:
        self._tell("done", _PARTS, _PARTS)
