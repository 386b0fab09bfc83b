"""How near variants of the demo's bundle come to FP32 on photographs and phrasings that are new to them.

::

    python -m tools.measure_variants BUNDLE VARIANT …

Calibrate with the first three phrasings of every instruction (``--write-prompts FILE`` writes them) and any
photographs but those of ``demo/photos``. This edits the six of ``demo/photos`` with the other two
phrasings, and prints PSNR of the picture against the bundle's own graphs, in dB, with deltas on: mean,
worst, and by instruction; SQNR is the mean of the pictures' signal to noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from demo.recipe.operations import OPERATIONS
from demo.run import HERE, psnr
from hywu_export.bundle.sessions import ModelBackend
from hywu_export.bundle.variants import load_graph
from hywu_export.passes.half import emulate
from hywu_runtime import Bundle, Editor

CALIBRATION_PHRASINGS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--write-prompts", type=Path)
    arguments = parser.parse_args()
    if arguments.write_prompts is not None:
        lines = [text for o in OPERATIONS for text in o.phrasings[:CALIBRATION_PHRASINGS]]
        arguments.write_prompts.write_text("\n".join(lines) + "\n")
    if arguments.variants:
        compare(arguments.bundle, arguments.variants)


def compare(bundle: Path, variants: list[str]) -> None:
    """Edits every held-out photograph with every instruction, and prints a table."""
    photos = sorted((HERE / "photos").glob("*.jpg"))
    cases = [
        (operation.name, photo, operation.phrasings[CALIBRATION_PHRASINGS + i % 2])
        for operation in OPERATIONS
        for i, photo in enumerate(photos)
    ]
    pictures = {}
    opened = Bundle.open(bundle)
    for variant in [None, *variants]:
        graphs = () if variant is None else opened.manifest.variants[variant].graphs
        models = {graph: emulate(load_graph(opened, graph, variant)) for graph in graphs}
        with Editor(opened, ModelBackend(opened, models)) as editor:
            pictures[variant] = [editor.edit(photo, text, seed=1, output="array") for _, photo, text in cases]
    print("| variant | mean | worst | SQNR | " + " | ".join(o.name for o in OPERATIONS) + " |")
    print("|---|" + "---:|" * (3 + len(OPERATIONS)))
    for variant in variants:
        pairs = list(zip(pictures[None], pictures[variant]))
        found = [psnr(a, b) for a, b in pairs]
        by_name = {o.name: [v for v, case in zip(found, cases) if case[0] == o.name] for o in OPERATIONS}
        numbers = [
            np.mean(found),
            min(found),
            np.mean([sqnr(a, b) for a, b in pairs]),
            *map(np.mean, by_name.values()),
        ]
        print(f"| {variant} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")


def sqnr(exact: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise of a picture, in dB."""
    signal = np.square(exact.astype(np.float64)).sum()
    return float(10 * np.log10(signal / max(np.square(exact.astype(np.float64) - other).sum(), 1e-12)))


if __name__ == "__main__":
    main()
