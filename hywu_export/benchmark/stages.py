"""Which stage each graph of a program belongs to, from the program alone."""

from __future__ import annotations

from hywu_runtime.manifest import Manifest
from hywu_runtime.program import make_plan

STAGES = (
    "encode",
    "condition",
    "generate",
    "bind",
    "prepare",
    "first_step",
    "steady_step",
    "step",
    "decode",
    "outside",
    "edit",
    "generate_call",
)
"""In the order of an edit. What a bundle or a run does not have is left out."""
_STEPS_OWN = ("noise", "schedule")


def makers_from_deltas(manifest: Manifest, graph: str) -> list[str]:
    """The graphs that make, once per request and from deltas, what ``graph`` reads: merged weights, say."""
    reads = {name for c in manifest.program if c.graph == graph for name in manifest.reads(c).values()}
    deltas = set(manifest.deltas.tensors) if manifest.deltas is not None else set()
    return [
        call.graph
        for call in manifest.program
        if call.phase == "request"
        and reads & set(manifest.writes(call).values())
        and deltas & set(manifest.reads(call).values())
    ]


def stages_of(manifest: Manifest, guided: bool) -> dict[str, str]:
    """Graph → ``encode``, ``condition``, ``generate``, ``prepare`` or ``decode``.

    ``generate`` makes deltas, ``condition`` is what is needed for them alone; ``prepare`` reads deltas, noise
    or the schedule before the steps; ``encode`` is the rest before the steps. A graph that is used in two
    stages belongs to the earlier of these.
    """
    image = manifest.results.image
    assert image is not None
    made = frozenset(manifest.results.deltas)
    whole = make_plan(manifest, [image], guided=guided)
    without = make_plan(manifest, [image], made, guided)
    needed = {i for calls in without.calls.values() for i in calls}
    deltas = set(manifest.deltas.tensors) if manifest.deltas is not None else set()
    early = {name for name, t in manifest.tensors.items() if t.source in _STEPS_OWN}
    found: dict[str, str] = {}
    for phase in ("load", "request", "final"):
        for i in whole.calls[phase]:
            call = manifest.program[i]
            if made & set(manifest.writes(call).values()):
                stage = "generate"
            elif i not in needed:
                stage = "condition"
            elif phase == "final":
                stage = "decode"
            else:
                reads = set(manifest.reads(call).values())
                stage = "prepare" if reads & (deltas | early) else "encode"
            found.setdefault(call.graph, stage)
    return found
