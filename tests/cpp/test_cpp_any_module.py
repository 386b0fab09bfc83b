"""A bundle of any module in the C++ runtime: the bytes of the Python runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import native
import numpy as np
import pytest
from native import Library, NativeError

from hywu_runtime import Deltas, Editor


@pytest.fixture(scope="module")
def bundle(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    from examples import any_module

    return once("any-module", lambda folder: (any_module.main(folder), None)[1])


def test_tensors_in_tensors_out(library: Library, bundle: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "input_ids": rng.integers(0, 256, (3, 11)),
        "context": rng.standard_normal((3, 24)).astype(np.float32),
    }
    ids = {"input_ids": inputs["input_ids"]}
    theirs = native.Editor.load(library, bundle, backend="ort-cpu", threads=2)
    assert theirs.outputs() == ["logits"]
    theirs.warm_up()
    with Editor.load(bundle, "ort-cpu", threads=2) as ours:
        made = theirs.run(inputs)
        assert list(made) == ["logits"]
        np.testing.assert_array_equal(made["logits"], ours.run(inputs)["logits"])

        deltas = ours.generate(inputs={"context": inputs["context"]})
        given = [native.Deltas.create(library, dict(deltas))]
        np.testing.assert_array_equal(theirs.run(ids, deltas=given)["logits"], made["logits"])
        sets = [Deltas({n: a[i : i + 1] for n, a in deltas.items()}) for i in (2, 0, 1)]
        strengths = [0.0, 1.0, -2.0]
        expected = ours.run(ids, deltas=sets, delta_strength=strengths, outputs=["logits"])["logits"]
        native_sets = [native.Deltas.create(library, dict(one)) for one in sets]
        got = theirs.run(ids, deltas=native_sets, delta_strength=strengths, outputs=["logits"])["logits"]
        np.testing.assert_array_equal(got, expected)


def test_what_does_not_fit(library: Library, bundle: Path, toy: Path) -> None:
    theirs = native.Editor.load(library, bundle, backend="ort-cpu", threads=1)
    ids, context = np.zeros((2, 4), np.int64), np.zeros((2, 24), np.float32)
    good = {"input_ids": ids, "context": context}
    for inputs, options, status, message in (
        ({"input_ids": ids}, {}, "INPUT", "'context' is missing"),
        ({"input_ids": ids.astype(np.int32), "context": context}, {}, "INPUT", "is int32"),
        (good, {"outputs": ["x"]}, "INPUT", "no output 'x'"),
        (good, {"delta_strength": [1.0, 0.5, 1.0]}, "INPUT", "3 entries"),
        ({"input_ids": ids, "context": np.full_like(context, np.nan)}, {}, "DELTA", "not finite"),
    ):
        with pytest.raises(NativeError, match=message) as raised:
            theirs.run(inputs, **options)  # type: ignore[arg-type]
        assert raised.value.status == status
    with pytest.raises(NativeError, match="makes no images"):
        theirs.edit(np.zeros((8, 8, 3), np.uint8), "x")
    assert theirs.run(good)["logits"].shape == (2, 4, 256)
    with pytest.raises(NativeError, match="names no outputs"):
        native.Editor.load(library, toy, backend="ort-cpu").run(good)
