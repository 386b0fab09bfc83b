"""Pictures in C++, against Pillow and the Python runtime: sizes, resampling, transparency, files."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from hywu_runtime.errors import InputError
from hywu_runtime.images import load_photo, parse_size, working_size
from hywu_runtime.manifest import ImagePolicy

PHOTO = Path(__file__).resolve().parents[2] / "demo" / "photos"
PROGRAM: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _program(executable: Callable[[str], Path]) -> None:
    PROGRAM[:] = [executable("hywu_image_pixels")]


def pixels(*arguments: object, given: bytes = b"") -> bytes:
    command = [str(PROGRAM[0]), *map(str, arguments)]
    result = subprocess.run(command, input=given, capture_output=True)
    if result.returncode == 1:
        raise InputError(result.stderr.decode().removeprefix("error: ").strip())
    assert result.returncode == 0, result.stderr
    return result.stdout


def read(path: Path, *target: int) -> np.ndarray:
    head, data = pixels("read", path, *target).split(b"\n", 1)
    width, height = map(int, head.split())
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.skipif(int(Image.__version__.split(".")[0]) < 13, reason="Pillow began with the rows until 12")
@settings(max_examples=150)
@given(
    st.tuples(*[st.integers(1, 160)] * 4) | st.tuples(*[st.integers(1, 12)] * 4),
    st.sampled_from(["noise", "edges", "white"]),
)
def test_resampling_is_pillows(sizes: tuple[int, int, int, int], kind: str) -> None:
    width, height, new_width, new_height = sizes
    array = noise(height, width, seed=width)
    if kind != "noise":  # the extremes, where sums are clipped
        array = (
            np.where(array < 128, 0, 255).astype(np.uint8) if kind == "edges" else np.full_like(array, 255)
        )
    expected = Image.fromarray(array).resize((new_width, new_height), Image.Resampling.LANCZOS)
    assert pixels("resize", *sizes, given=array.tobytes()) == np.asarray(expected).tobytes()


@pytest.mark.parametrize("sizes", [(4000, 3000, 512, 384), (1080, 1920, 1024, 1056), (1, 3000, 64, 64)])
def test_large_pictures(sizes: tuple[int, int, int, int]) -> None:
    array = noise(sizes[1], sizes[0])
    expected = Image.fromarray(array).resize(sizes[2:], Image.Resampling.LANCZOS)
    assert pixels("resize", *sizes, given=array.tobytes()) == np.asarray(expected).tobytes()


def test_transparency_for_every_alpha_and_level() -> None:
    alpha, level = np.meshgrid(np.arange(256), np.arange(256))
    array = np.stack([level, 255 - level, level // 2, alpha], axis=-1).astype(np.uint8)
    expected = load_photo(array)
    assert pixels("white", given=array.tobytes()) == expected.tobytes()


@settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 20000), st.integers(1, 20000)),
    st.tuples(st.integers(1, 96), st.integers(1, 600), st.integers(0, 2048), st.integers(1, 4_000_000)),
)
def test_working_size_is_the_runtimes(size: tuple[int, int], limits: tuple[int, int, int, int]) -> None:
    multiple, least, more, area = limits
    policy = ImagePolicy("image", multiple, least, least + multiple + more, area)
    got = pixels("size", *size, multiple, least, policy.max, area)
    assert tuple(map(int, got.split())) == working_size(*size, policy)


@settings(max_examples=100)
@given(
    st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=6),
)
def test_the_sizes_of_a_policy(size: tuple[int, int], offered: list[tuple[int, int]]) -> None:
    sizes = tuple((8 * w, 8 * h) for w, h in offered)
    policy = ImagePolicy("image", 8, 16, 160, 64 * 64, sizes)
    got = pixels("size", *size, 8, 16, 160, 64 * 64, len(sizes), *sum(sizes, ()))
    assert tuple(map(int, got.split())) == working_size(*size, policy)


@pytest.mark.parametrize("size", [(64, 96), (63, 64), (64, 4096), (0, 64), (-64, 64)])
def test_explicit_size(size: tuple[int, int]) -> None:
    policy = ImagePolicy("image", 32, 64, 1024, 65536)
    arguments = ("size", 100, 100, 32, 64, 1024, 65536, *size)
    if size == (64, 96):
        assert pixels(*arguments).split() == [b"64", b"96"]
        return
    with pytest.raises(InputError) as python:
        parse_size(size, policy)
    with pytest.raises(InputError) as cpp:
        pixels(*arguments)
    assert str(cpp.value).split(". ", 1)[1] == str(python.value).split(". ", 1)[1]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(color: int, depth: int, extra: bytes = b"", interlaced: bool = False, size: int = 9) -> bytes:
    """A PNG of random samples of any kind, which Pillow does not write."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    rng = np.random.default_rng(color * 100 + depth)

    def rows(width: int, height: int) -> bytes:
        length = -(-width * samples * depth // 8)
        return b"".join(b"\0" + rng.bytes(length) for _ in range(height)) if width and height else b""

    if interlaced:
        starts = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        ]
        data = b"".join(rows(-(-(size - x) // dx), -(-(size - y) // dy)) for x, y, dx, dy in starts)
    else:
        data = rows(size, size)
    header = struct.pack(">IIBBBBB", size, size, depth, color, 0, 0, int(interlaced))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", rng.bytes(3 * 2**depth)) if color == 3 else b"")
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)]
KINDS += [(4, 8), (4, 16), (6, 8), (6, 16)]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("color", "depth"), KINDS)
def test_png_of_every_kind(tmp_path: Path, color: int, depth: int, interlaced: bool) -> None:
    path = tmp_path / "a.png"
    keys = {0: [b"\0\0", b"\0\1", b"\0\xff"], 2: [bytes(6)], 3: [bytes(range(0, 2 * 2 ** min(depth, 6), 2))]}
    transparency = [b"", *(chunk(b"tRNS", key) for key in keys.get(color, []))]
    transparency.append(chunk(b"gAMA", struct.pack(">I", 30000)))
    for extra in transparency:
        path.write_bytes(png(color, depth, extra, interlaced))
        np.testing.assert_array_equal(read(path), load_photo(path), err_msg=f"{extra!r}")


def test_key_colours_that_occur(tmp_path: Path) -> None:
    """Gray and RGB files in which one value is transparent."""
    path = tmp_path / "a.png"
    array = noise(16, 16) // 64 * 64
    Image.fromarray(array).save(path, transparency=tuple(map(int, array[3, 3])))
    np.testing.assert_array_equal(read(path), load_photo(path))
    assert (read(path)[3, 3] == 255).all()
    gray = Image.fromarray(array[..., 0])
    gray.save(path, transparency=64)
    np.testing.assert_array_equal(read(path), load_photo(path))
    gray.convert("P").save(path, transparency=b"\0\x80\xff" * 50)
    np.testing.assert_array_equal(read(path), load_photo(path))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12"
    short = big_endian + struct.pack(">HIHHI", 3, 1, orientation, 0, 0)
    long = big_endian + struct.pack(">HIII", 4, 1, orientation, 0)
    for block in (exif.tobytes(), short, long):
        Image.fromarray(noise(7, 11)).save(path, exif=block)
        expected = load_photo(path)
        assert expected.shape == ((11, 7, 3) if orientation in (5, 6, 7, 8) else (7, 11, 3))
        same_decoder(read(path), expected)


def test_orientation_in_xmp(tmp_path: Path) -> None:
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(7, 11)).save(path, xmp=packet)
    expected = load_photo(path)
    assert expected.shape == (11, 7, 3)
    same_decoder(read(path), expected)


def same_decoder(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal pixels. Pillow brings its own libjpeg-turbo, which decodes as the system's does by default."""
    assert features.check("libjpeg_turbo")
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}]
)
def test_jpeg(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    path = tmp_path / "a.jpg"
    smooth = Image.fromarray(noise(9, 13)).resize((131, 67), Image.Resampling.BICUBIC)
    smooth.convert(mode).save(path, **options)
    same_decoder(read(path), load_photo(path))


@pytest.mark.parametrize("size", [(1200, 900), (903, 1207), (260, 2000), (64, 64), (2048, 130)])
def test_large_jpegs_are_decoded_smaller(tmp_path: Path, size: tuple[int, int]) -> None:
    """As the Python runtime's `draft`: bringing both to the working size gives the same bytes."""
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(size[1] // 8, size[0] // 8)).resize(size, Image.Resampling.BICUBIC).save(path)
    policy = ImagePolicy("image", 8, 64, 512, 128 * 96)
    target = working_size(*size, policy)
    got = read(path, *target)
    assert got.size <= size[0] * size[1] * 3
    resized = Image.fromarray(got).resize(target, Image.Resampling.LANCZOS)
    same_decoder(np.asarray(resized), load_photo(path, policy))


def test_photographs(tmp_path: Path) -> None:
    photos = sorted(p for p in PHOTO.rglob("*") if p.suffix in (".jpg", ".png"))[:6]
    assert photos
    for path in photos:
        same_decoder(read(path), load_photo(path))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_writing(tmp_path: Path, suffix: str) -> None:
    array = np.asarray(Image.fromarray(noise(6, 5)).resize((40, 30), Image.Resampling.BICUBIC))
    path = tmp_path / f"ü{suffix}"
    pixels("write", path, 40, 30, given=array.tobytes())
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as image:
        got = np.asarray(image.convert("RGB"))
    if suffix == ".png":
        np.testing.assert_array_equal(got, array)
        return
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    with Image.open(buffer) as image:
        np.testing.assert_array_equal(got, np.asarray(image))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"known picture suffix.*\.png"):
        pixels("write", tmp_path / "a.gif", 1, 1, given=b"abc")
    with pytest.raises(InputError, match="cannot be written"):
        pixels("write", tmp_path / "none" / "a.png", 1, 1, given=b"abc")
    assert not list(tmp_path.iterdir())


def damaged(data: bytes) -> list[bytes]:
    rng = np.random.default_rng(0)
    result = [data[:n] for n in (0, 1, 7, 8, 20, 40, len(data) // 2, len(data) - 20)]
    for _ in range(40):
        copy = bytearray(data)
        for at in rng.integers(0, len(data), 5):
            copy[at] = rng.integers(0, 256)
        result.append(bytes(copy))
    return result


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_damaged_files_are_errors_and_never_crashes(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(20, 30)).save(buffer, suffix)
    path = tmp_path / "a"
    refused = []
    for data in damaged(buffer.getvalue()):
        path.write_bytes(data)
        try:
            assert read(path).ndim == 3
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= 8
    for message in refused:
        assert message.count(". ") == 2, message  # three parts
        assert "photograph" in message


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_that_pillow_reads_are_read_alike(tmp_path: Path, progressive: bool) -> None:
    """Cameras leave bytes between markers; a changed byte spoils pixels, the same ones."""
    buffer = io.BytesIO()
    Image.fromarray(noise(12, 16)).resize((90, 60)).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()
    files = [data[:-2] + b"\0\0\0" + data[-2:], data + b"more"]
    rng = np.random.default_rng(0)
    for at in rng.integers(20, len(data), 40):
        files.append(data[:at] + rng.bytes(1) + data[at + 1 :])
    path = tmp_path / "a.jpg"
    equal = 0
    for content in files:
        path.write_bytes(content)
        try:
            expected = load_photo(path)
        except InputError:
            with pytest.raises(InputError):
                read(path)
        else:
            same_decoder(read(path), expected)
            equal += 1
    assert equal >= 20


def test_bombs_and_missing_files(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match="100000x100000 pixels"):
        read(path)
    with pytest.raises(InputError, match="There is no file"):
        read(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)
    path.write_bytes(b"RIFF\0\0\0\0WEBPVP8 ")
    with pytest.raises(InputError, match="neither JPEG nor PNG"):
        read(path)
