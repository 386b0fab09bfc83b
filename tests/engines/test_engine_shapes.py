"""Sizes: what is said, what follows, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hywu_export.engines.devices import check_rtx, parse_capabilities
from hywu_export.engines.shapes import ShapeOptions, engine_shapes, profile
from hywu_runtime import Manifest
from hywu_runtime.errors import HywuError, InputError, UnsupportedError
from hywu_runtime.manifest import Axis


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Manifest.read(bundle)


def shapes(manifest: Manifest, **options: object) -> dict[str, tuple[int, int, int]]:
    return engine_shapes(manifest, manifest.graphs, ShapeOptions(**options))  # type: ignore[arg-type]


def test_defaults_follow_from_the_bundle(manifest: Manifest) -> None:
    found = shapes(manifest)
    assert manifest.image is not None
    assert found["batch"] == found["delta_batch"] == (1, 1, 4)
    low, best, high = found["height"]
    assert found["width"] == found["height"]
    assert manifest.image.min <= low <= best <= high <= manifest.image.max
    assert all(size % manifest.image.multiple == 0 for size in (low, best, high))
    assert "latent_height" not in found


def test_defaults_cover_the_sizes_that_photos_come_to(manifest: Manifest) -> None:
    assert manifest.image is not None
    image = replace(manifest.image, default_area=64 * 64, sizes=((32, 96), (64, 64), (96, 32)))
    found = shapes(replace(manifest, image=image))
    assert found["height"] == found["width"] == (32, 64, 96)


def test_derived_axes_and_the_delta_batch(manifest: Manifest) -> None:
    found = shapes(manifest, sizes="16x32:32x32:64x96", batch="1:2:3", delta_batch="1:1:2")
    assert found["width"] == (16, 32, 64)
    assert found["height"] == (32, 32, 96)
    step = manifest.graphs["step"]
    shaped = profile(manifest, step.inputs, found)
    divide = manifest.axes["latent_height"].divide or 1
    assert [shape[0] for shape in shaped["latents"]] == [1, 2, 3]
    assert [shape[2:] for shape in shaped["latents"]] == [
        (h // divide, w // divide) for h, w in ((32, 16), (32, 32), (96, 64))
    ]
    deltas = [name for name in shaped if name.endswith(".lora_A")]
    assert deltas
    assert all([shape[0] for shape in shaped[name]] == [1, 1, 2] for name in deltas)
    assert "timestep" not in shaped


def test_one_size(manifest: Manifest) -> None:
    found = shapes(manifest, sizes="32x64", batch="2")
    assert (found["width"], found["height"], found["batch"]) == ((32,) * 3, (64,) * 3, (2,) * 3)
    assert found["delta_batch"] == (1, 2, 2)


def test_only_axes_of_the_graphs(manifest: Manifest) -> None:
    assert engine_shapes(manifest, ["text_encoder"], ShapeOptions()).keys() == {"batch"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": "32"}, "not understood"),
        ({"sizes": "64x64:32x32:96x96"}, "not in order"),
        ({"sizes": "33x32"}, "multiples"),
        ({"sizes": "32x32:64x64:4096x4096"}, "limits of the bundle"),
        ({"batch": "1:2"}, "not understood"),
        ({"batch": "0:1:2"}, "limits"),
        ({"batch": "1:1:999"}, "limits"),
        ({"batch": "1:1:2", "delta_batch": "1:1:3"}, "'batch' allows"),
        ({"axes": {"ghost": "1:2:3"}}, "no such axis"),
        ({"axes": {"latent_height": "8"}}, "no such axis"),
    ],
)
def test_what_is_refused(manifest: Manifest, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        shapes(manifest, **options)
    assert all((caught.value.wrong, caught.value.expected, caught.value.remedy))


def test_a_derived_axis_that_does_not_divide(manifest: Manifest) -> None:
    odd = replace(manifest, axes={**manifest.axes, "latent_height": Axis(of="height", divide=7)})
    with pytest.raises(InputError, match="latent_height"):
        profile(odd, odd.graphs["step"].inputs, shapes(odd))


@given(st.text(alphabet="0123456789x:,. -", max_size=20), st.text(alphabet="0123456789:", max_size=9))
def test_any_text_is_understood_or_refused(manifest: Manifest, sizes: str, batch: str) -> None:
    try:
        found = shapes(manifest, sizes=sizes, batch=batch)
    except InputError:
        return
    assert all(low <= best <= high for low, best, high in found.values())


def test_capabilities() -> None:
    assert parse_capabilities("89,8.6,86, sm_120,75") == ("7.5", "8.6", "8.9", "12.0")
    check_rtx(parse_capabilities("75,80,86,89,120,121"))
    for text in ("99", "banana", "", "8.6,", "860"):
        with pytest.raises(UnsupportedError, match="no compute capability"):
            parse_capabilities(text)


@pytest.mark.parametrize(
    ("text", "device"), [("87", "Orin"), ("90", "H100"), ("10.0", "B200"), ("110", "Thor")]
)
def test_capabilities_of_other_devices(text: str, device: str) -> None:
    with pytest.raises(HywuError, match=device):
        check_rtx(parse_capabilities(text))
