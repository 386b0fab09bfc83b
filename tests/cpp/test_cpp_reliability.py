"""Resident memory over many edits, and what editors of one bundle share of it.

``python tests/cpp/test_cpp_reliability.py curve LIBRARY BUNDLE EDITS``: the curve of docs/reliability.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def curve(library_path: Path, bundle: Path, edits: int, points: int = 10) -> list[tuple[int, int]]:
    """(edits done, resident bytes): every edit has another photo, prompt and deltas; some have another batch
    size, some are cancelled, some fail.
    """
    import native
    import numpy as np

    library = native.Library(library_path)
    editor = native.Editor.load(library, bundle, threads=1)
    toy = editor.limits().size_max <= 64
    rng = np.random.default_rng(0)

    def one(k: int) -> None:
        batch = 1 + (k % 3 == 0)
        side = 16 if toy else 64
        photos = [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(batch)]
        options: dict[str, Any] = {"seed": k, "size": (side, side)}
        if not toy:
            options["steps"] = 1
        else:
            options["inputs"] = {"region": rng.random((batch, 1, side // 4, side // 4), np.float32)}
        if k % 2:
            made = editor.generate(photos[0], f"instruction {k}", size=(side, side))
            options["deltas"] = [native.Deltas.blend(library, [(made, 0.5 + k % 7)])]
        if k % 10 == 9:
            options["steps"] = 9999
        if k % 10 == 7:
            options["progress"] = lambda done, total: 1
        try:
            editor.edit_batch([(photo, f"instruction {k}") for photo in photos], **options)
        except native.NativeError:
            if k % 10 not in (7, 9):
                raise

    warm = max(edits // 10, 20)  # ONNX Runtime's arenas grow to what the largest request takes
    found = []
    for k in range(warm + edits):
        if k >= warm and (k - warm) % (edits // points) == 0:
            found.append((k - warm, resident()))
        one(k)
    return [*found, (edits, resident())]


def sharing(library_path: Path, bundle: Path, editors: int) -> list[int]:
    """Resident bytes after each editor of one bundle has edited; then after one of a bundle opened again."""
    import native
    import numpy as np

    library = native.Library(library_path)
    shared = native.Bundle.open(library, bundle)
    photo = np.zeros((64, 64, 3), np.uint8)
    kept: list[Any] = []
    found = []
    for k in range(editors + 1):
        source = shared if k < editors else native.Bundle.open(library, bundle)
        kept.append(source.editor(threads=1))
        kept[-1].edit(photo, "make it sepia", size=(64, 64))
        found.append(resident())
    return found


def in_a_process_of_its_own(what: str, *arguments: object) -> list[Any]:
    command = [sys.executable, __file__, what, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(map(int, line.split())) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat(library: Any, toy: Path) -> None:
    points = in_a_process_of_its_own("curve", library.path, toy, 400)
    sizes = [size for _, size in points]
    assert max(sizes[5:]) - max(sizes[:5]) < 2**20, points


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_editors_of_one_bundle_share_weights(library: Any, demo_bundle: Path) -> None:
    sizes = [size for (size,) in in_a_process_of_its_own("sharing", library.path, demo_bundle, 3)]
    weights = sum(file.stat().st_size for file in (demo_bundle / "weights").iterdir())
    assert sizes[2] - sizes[0] < 0.5 * weights  # two more editors
    assert sizes[3] - sizes[2] > 0.5 * weights  # one that shares nothing


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    what, library_path, bundle, number = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    if what == "curve":
        for done, size in curve(library_path, bundle, number):
            print(done, size, flush=True)
    else:
        for size in sharing(library_path, bundle, number):
            print(size)
