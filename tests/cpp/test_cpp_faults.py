"""Damaged bundles in the C++ runtime: files missing, cut short or changed, at every point of the load."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
from native import STATUS, Library, NativeError

PHOTO = np.full((8, 16, 3), 100, np.uint8)
REGION = {"region": np.full((1, 1, 2, 4), 0.5, np.float32)}


def edit(library: Library, path: Path, **options: Any) -> Any:
    editor = native.Editor.load(library, path, threads=1, **options)
    return editor.edit(PHOTO, "abc", inputs=REGION)


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy, tmp_path / "bundle")
    return tmp_path / "bundle"


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def refused(library: Library, path: Path, file: Path, **options: Any) -> NativeError:
    with pytest.raises(NativeError) as caught:
        edit(library, path, **options)
    assert caught.value.status == "BUNDLE", (file, str(caught.value))
    assert all(caught.value.parts), caught.value.parts
    return caught.value


def test_every_file_missing_cut_or_changed(library: Library, toy: Path, copy: Path) -> None:
    expected = edit(library, toy)
    for file in files(copy):
        whole = file.read_bytes()
        file.unlink()
        refused(library, copy, file)
        for length in {0, 1, len(whole) // 2, len(whole) - 2}:  # the last byte of the manifest is a line feed
            file.write_bytes(whole[:length])
            refused(library, copy, file)
        file.write_bytes(whole + b"\0")
        if file.name != "manifest.json":
            refused(library, copy, file)
        if file.name != "manifest.json":
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert "SHA-256" in str(refused(library, copy, file, verify=True))
        file.write_bytes(whole)
    np.testing.assert_array_equal(edit(library, copy, verify=True), expected)


def test_changed_bytes_never_crash(library: Library, copy: Path) -> None:
    """Sizes stay the same, so nothing but the content can be noticed; an editor may also not notice."""
    rng = np.random.default_rng(3)
    for file in files(copy):
        whole = file.read_bytes()
        for _ in range(12):
            changed = bytearray(whole)
            for place in rng.integers(0, len(whole), rng.integers(1, 5)):
                changed[place] = int(rng.integers(0, 256))
            file.write_bytes(changed)
            with contextlib.suppress(NativeError):
                edit(library, copy)
                continue
            assert STATUS[library.lib.hywu_last_status()] not in ("OK", "INTERNAL", "MEMORY", "CALLBACK")
            assert library.lib.hywu_last_error_part(0)
        file.write_bytes(whole)


def test_a_graph_of_another_signature(library: Library, copy: Path) -> None:
    from toy_bundle import rewrite

    shutil.copy(copy / "encode.onnx", copy / "final.onnx")
    rewrite(copy, lambda manifest: None)
    error = refused(library, copy, copy / "final.onnx")
    assert "final.onnx has for input 'cache': nothing" in str(error)


def test_a_file_that_goes_after_the_bundle_was_opened(library: Library, copy: Path) -> None:
    editor = native.Editor.load(library, copy, threads=1, low_memory=True)
    expected = editor.edit(PHOTO, "abc", inputs=REGION)
    whole = (copy / "step.onnx").read_bytes()
    (copy / "step.onnx").unlink()
    with pytest.raises(NativeError, match=r"step.onnx is missing") as caught:
        editor.edit(PHOTO, "abc", inputs=REGION)
    assert caught.value.status == "BUNDLE"
    (copy / "step.onnx").write_bytes(whole)
    np.testing.assert_array_equal(editor.edit(PHOTO, "abc", inputs=REGION), expected)
