"""Photographs of every kind, and files that are none."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hywu_runtime.errors import InputError
from hywu_runtime.images import fit, load_photo, parse_size, save_picture, working_size
from hywu_runtime.manifest import ImagePolicy

POLICY = ImagePolicy("image", multiple=32, min=64, max=1024, default_area=65536)


def gradient(width: int = 40, height: int = 30) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2).astype(
        np.uint8
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG"])
def test_formats(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(gradient())
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, **options)
    (tmp_path / "photo").write_bytes(data)
    results = [load_photo(data), load_photo(tmp_path / "photo"), load_photo(str(tmp_path / "photo"))]
    for result in results:
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, results[0])
        assert np.abs(result.astype(int) - gradient()).mean() < (0.01 if kind not in ("GIF", "JPEG") else 12)


def test_pil_images_and_arrays_are_left_alone() -> None:
    image = Image.fromarray(gradient())
    np.testing.assert_array_equal(load_photo(image), gradient())
    assert image.getpixel((0, 0)) == (0, 0, 0)  # still open
    np.testing.assert_array_equal(load_photo(gradient()), gradient())
    gray = gradient()[..., 0]
    for array in (gray, gray[..., None], gray.astype(np.uint16) * 257):
        np.testing.assert_array_equal(load_photo(array), np.repeat(gray[..., None], 3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = gradient(64, 32)
    # The stored image that a viewer turns upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    result = load_photo(data)
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).mean() < 8
    policy = ImagePolicy("image", multiple=16, min=16, max=64, default_area=64 * 32)
    assert load_photo(data, policy).shape == (32, 64, 3)


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    for image in (Image.fromarray(rgba), Image.fromarray(rgba).convert("LA")):
        result = load_photo(encoded(image))
        assert (result[:2] == 0).all()
        assert (result[2:] == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(load_photo(encoded(palette)), [[[10, 20, 30], [40, 50, 60]]])
    np.testing.assert_array_equal(
        load_photo(encoded(palette, transparency=1)), [[[10, 20, 30], [255, 255, 255]]]
    )
    np.testing.assert_array_equal(load_photo(rgba), load_photo(Image.fromarray(rgba)))


def test_cmyk_sixteen_bit_gray_and_bilevel() -> None:
    cmyk = Image.fromarray(gradient(64, 64)).convert("CMYK")
    assert np.abs(load_photo(encoded(cmyk, "JPEG", quality=95)).astype(int) - gradient(64, 64)).mean() < 8
    gray = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, 2)
    np.testing.assert_array_equal(load_photo(encoded(Image.fromarray(gray))), expected)
    np.testing.assert_array_equal(load_photo(Image.fromarray(gray.astype(np.int32))), expected)
    assert set(load_photo(encoded(Image.new("1", (3, 3), 1))).ravel().tolist()) == {255}
    assert (load_photo(Image.fromarray(np.full((2, 2), np.nan, np.float32))) == 0).all()


def test_animation_gives_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_photo(data)[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_is_enlarged() -> None:
    result = load_photo(np.full((1, 1, 3), 77, np.uint8), POLICY)
    assert result.shape == (64, 64, 3)
    assert (result == 77).all()
    assert load_photo(encoded(Image.new("RGB", (3000, 1))), POLICY).shape == (64, 1024, 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 3000), (288, 224)),
        ((256, 256), (256, 256)),
        ((100, 100), (96, 96)),
        ((1000, 100), (800, 96)),
        ((2000, 50), (1024, 64)),
        ((1, 1), (64, 64)),
        ((80, 80), (96, 96)),
        ((300, 200), (288, 192)),
    ],
)
def test_working_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert working_size(*size, POLICY) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (320, 224)),
        ((48, 64), (224, 320)),  # enlarged
        ((301, 300), (256, 256)),
        ((2, 1), (320, 224)),
        ((20000, 1), (320, 224)),
    ],
)
def test_sizes_of_the_policy(size: tuple[int, int], expected: tuple[int, int]) -> None:
    policy = replace(POLICY, sizes=((320, 224), (224, 320), (256, 256), (1024, 64)), max=512)
    assert working_size(*size, policy) == expected
    assert parse_size("1024x64", POLICY) == (1024, 64)  # an explicit size is free
    assert working_size(*size, replace(policy, min=257, max=288)) == working_size(
        *size, replace(POLICY, min=257, max=288)
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.sampled_from([1, 8, 24, 32]),
    st.integers(1, 100),
    st.integers(200, 2000),
)
def test_working_size_is_always_allowed(width: int, height: int, multiple: int, low: int, high: int) -> None:
    policy = ImagePolicy("image", multiple, low, high, 256 * 256)
    w, h = working_size(width, height, policy)
    assert parse_size((w, h), policy) == (w, h)
    if (
        min(width, height) >= 256
        and max(width, height) < 4 * min(width, height)
        and high >= 1000
        and low <= 64
    ):
        assert abs(np.log(w / h * height / width)) < 2.5 * multiple / min(w, h)  # the aspect is kept


def test_parse_size() -> None:
    for size in ("512x384", "512 x 384", "512×384", (512, 384), [512, 384], (np.int64(512), 384)):
        assert parse_size(size, POLICY) == (512, 384)  # type: ignore[arg-type]
    assert parse_size(128, POLICY) == parse_size("128", POLICY) == (128, 128)
    for bad in (
        "",
        "x",
        "512x",
        "-64x64",
        "64x65",
        "32",
        "2048",
        "9" * 50,
        "٦٤",
        0,
        -64,
        64.0,
        True,
        None,
        (64,),
        (64, 64, 64),
        "64x64x64",
    ):
        with pytest.raises(InputError):
            parse_size(bad, POLICY)  # type: ignore[arg-type]


def test_fit_is_lanczos() -> None:
    photo = gradient(300, 200)
    expected = np.asarray(Image.fromarray(photo).resize((288, 192), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(fit(photo, POLICY), expected)
    assert fit(photo, POLICY, "64x128").shape == (128, 64, 3)


def test_a_large_photo_costs_little(tmp_path: Path) -> None:
    small = Image.fromarray(gradient(400, 300))
    small.resize((4000, 3000)).save(tmp_path / "large.jpg", quality=90)
    tracemalloc.start()
    result = load_photo(tmp_path / "large.jpg", POLICY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.shape == (224, 288, 3)
    assert (
        np.abs(result.astype(int) - np.asarray(small.resize((288, 224), Image.Resampling.LANCZOS))).mean() < 3
    )
    assert peak < 12e6


def bomb() -> bytes:
    """A PNG that says it is 60000x60000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "photo",
    [
        b"",
        b"not an image",
        b"\xff\xd8\xff\xe0",
        bomb(),
        encoded(Image.fromarray(gradient()))[:-40],
        encoded(Image.fromarray(gradient(200, 200)), "JPEG")[:2000],
        "ghost.jpg",
        "/",
        "a\0b",
        5,
        None,
        ["x"],
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5, 2), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((5,), np.uint8),
        np.zeros((2, 2, 2, 3), np.uint8),
        np.zeros((5, 5, 3), bool),
        Image.new("RGB", (0, 5)),
    ],
    ids=lambda photo: type(photo).__name__,
)
@pytest.mark.parametrize("policy", [None, POLICY])
def test_what_is_no_photo(photo: Any, policy: ImagePolicy | None) -> None:
    with pytest.raises(InputError) as caught:
        load_photo(photo, policy)
    assert caught.value.expected
    assert caught.value.remedy


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
    st.integers(0, 10**6),
)
def test_damaged_files(kind: str, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(encoded(Image.fromarray(gradient(16, 16)), kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        result = load_photo(bytes(data[: cut % len(data)] if cut % 3 == 0 else data), POLICY)
    except InputError:
        return
    assert result.dtype == np.uint8
    assert result.shape[2] == 3


def test_save(tmp_path: Path) -> None:
    for suffix in (".png", ".JPG", ".jpeg", ".webp"):
        save_picture(gradient(), tmp_path / f"a{suffix}")
        assert np.abs(load_photo(tmp_path / f"a{suffix}").astype(int) - gradient()).mean() < 5
    save_picture(Image.fromarray(gradient()), tmp_path / "b.png")
    np.testing.assert_array_equal(load_photo(tmp_path / "b.png"), gradient())
    before = sorted(os.listdir(tmp_path))
    for path in ("a.txt", "a", "ghost/a.png"):
        with pytest.raises(InputError):
            save_picture(gradient(), tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == before
