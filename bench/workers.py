"""Peers in processes of their own, of which one works at a time."""

from __future__ import annotations

import multiprocessing
import resource
import time
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt


class Worker:
    """One peer of `bench.peers` at work on its subject."""

    def __init__(self, peer: str, subject: Any):
        context = multiprocessing.get_context("spawn")  # no thread pool of ours in the child
        self.peer = peer
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, peer, subject), daemon=True)
        self._process.start()
        self.load_seconds: float = self._ask("load")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()

    def edit(self, number: int) -> dict[str, float]:
        """One edit with the LoRA ``number``; see `bench.peers`."""
        times: dict[str, float] = self._ask("edit", number)
        return times

    def picture(self) -> npt.NDArray[np.uint8] | None:
        """What the last edit made, uint8 ``[H, W, 3]``, if the peer makes pictures."""
        made: npt.NDArray[np.uint8] | None = self._ask("picture")
        return made

    def peak_bytes(self) -> int:
        """The process's largest resident memory so far."""
        return int(self._ask("peak"))

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        try:
            well, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"The peer {self.peer} ended without an answer") from None
        if not well:
            raise RuntimeError(f"The peer {self.peer} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, name: str, subject: Any) -> None:
    from bench.peers import GENERATORS, PEERS

    peer: Any = None
    while True:
        question, *arguments = pipe.recv()
        try:
            answer: Any = None
            if question == "load":
                start = time.perf_counter()
                kind, options = (PEERS | GENERATORS)[name]
                peer = kind(subject, **options)
                answer = time.perf_counter() - start
            elif question == "edit":
                answer = peer.edit(*arguments)
            elif question == "picture":
                answer = peer.picture
            elif question == "peak":
                answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send((True, answer))
        except Exception:
            pipe.send((False, traceback.format_exc()))
