"""``hywu edit`` and ``hywu deltas generate``, with good photographs and arguments and with bad ones."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from cli_tools import answer, check_refusal, names, picture, refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli_basics import COMMAND, environment

from hywu_runtime import Deltas, Editor, Manifest


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return picture(tmp_path / "photo.jpg")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_edit_is_the_editor(bundle: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited.png"
    result = answer(
        "edit", bundle, photo, "make it sepia", "--steps", 3, "--seed", 42, "--delta-strength", 0.8,
        "--guidance", "text=4", "--guidance", "image=1.2", "--negative-prompt", "ugly", "--size", "24x16",
        "--scheduler", "euler", "--out", out, "--threads", 1, "--low-memory", "--backend", "ort-cpu",
    )  # fmt: skip
    assert result["out"] == str(out)
    assert (result["width"], result["height"]) == (24, 16)
    assert len(result["seconds"]["steps"]) == 3
    with Editor.load(bundle, backend="ort-cpu") as editor:
        expected = editor.edit(
            photo, "make it sepia", steps=3, seed=42, delta_strength=0.8, guidance=4, image_guidance=1.2,
            negative_prompt="ugly", size="24x16", sampler="euler", output="array",
        )  # fmt: skip
    np.testing.assert_array_equal(pixels(out), expected)


def test_default_output(bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = run("edit", bundle, photo, "a cat", "--steps", 1)
    assert names(here) == {"photo-edited.png"}
    assert result.stdout.startswith("photo-edited.png: 24x16, 1 evaluation of ")
    assert result.stderr == ""


def test_deltas_saved_and_used_again(bundle: Path, photo: Path, tmp_path: Path) -> None:
    first, second, file, other = (
        tmp_path / name for name in ("a.png", "b.png", "d.safetensors", "e.safetensors")
    )
    plain = ("--steps", 2, "--seed", 7)
    run("edit", bundle, photo, "make it sepia", *plain, "--out", first, "--save-deltas", file)
    run("edit", bundle, photo, "make it sepia", *plain, "--out", second, "--deltas", file)
    np.testing.assert_array_equal(pixels(first), pixels(second))
    assert answer("deltas", "generate", bundle, photo, "make it sepia", "--out", other)["rank"] == 4
    assert file.read_bytes() == other.read_bytes()
    run("edit", bundle, photo, "make it sepia", *plain, "--out", second, "--delta-strength", 0)
    assert (pixels(first) != pixels(second)).any()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.jpg", "CMYK"),
        ("a.png", "RGBA"),
        ("a.png", "LA"),
        ("a.png", "L"),
        ("a.png", "1"),
        ("a.png", "P"),
        ("a.webp", "RGB"),
    ],
)
def test_picture_modes(bundle: Path, tmp_path: Path, name: str, mode: str) -> None:
    source = picture(tmp_path / name, mode=mode)
    run("edit", bundle, source, "a cat", "--steps", 1, "--out", tmp_path / "out.png")
    assert pixels(tmp_path / "out.png").shape == (16, 24, 3)


def test_sixteen_bits(bundle: Path, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    run("edit", bundle, tmp_path / "deep.png", "a cat", "--steps", 1, "--out", tmp_path / "out.png")
    assert pixels(tmp_path / "out.png").shape == (16, 24, 3)


def test_rotated_by_exif(bundle: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = picture(tmp_path / "turned.jpg", exif=exif)
    run("edit", bundle, source, "a cat", "--steps", 1, "--out", tmp_path / "out.png")
    assert pixels(tmp_path / "out.png").shape == (24, 16, 3)


def test_one_pixel(bundle: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "dot.png", 1, 1)
    run("edit", bundle, source, "a cat", "--steps", 1, "--out", tmp_path / "out.png")
    assert pixels(tmp_path / "out.png").shape == (4, 4, 3)


@pytest.mark.parametrize("prompt", ["", " ", "make it sepia " * 3000, "猫 🐈 café", "--", "\t\n"])
def test_prompts(bundle: Path, photo: Path, tmp_path: Path, prompt: str) -> None:
    result = run("edit", "--steps", 1, "--out", tmp_path / "out.png", "--", bundle, photo, prompt)
    assert ("was cut" in result.stderr) == (len(prompt) > 1000)
    assert (tmp_path / "out.png").exists()


def bomb(path: Path) -> Path:
    """A PNG of a hundred bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    return path


def text(path: Path) -> Path:
    path.write_text("no picture")
    return path


def cut(path: Path) -> Path:
    data = picture(path, 200, 200).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    "make", [bomb, text, cut, empty, lambda path: path.parent, lambda path: path / "nothing"]
)
def test_no_photo(bundle: Path, tmp_path: Path, make: object) -> None:
    assert callable(make)
    source = make(tmp_path / "photo.png")
    before = names(tmp_path)
    refused("edit", bundle, source, "a cat", "--steps", 1, "--out", tmp_path / "out.png")
    refused("deltas", "generate", bundle, source, "a cat", "--out", tmp_path / "out.safetensors")
    assert names(tmp_path) == before


BAD = {
    "size not divisible": ("--size", "33x32"),
    "size zero": ("--size", "0x0"),
    "size absurd": ("--size", "100000x100000"),
    "size negative": ("--size", "-8"),
    "size no number": ("--size", "large"),
    "size without height": ("--size", "32x"),
    "no steps": ("--steps", "0"),
    "negative steps": ("--steps", "-1"),
    "absurd steps": ("--steps", "1000000000"),
    "endless steps": ("--steps", "9" * 100),
    "scheduler": ("--scheduler", "ghost"),
    "seed negative": ("--seed", "-1"),
    "seed too large": ("--seed", str(2**64)),
    "strength": ("--delta-strength", "nan"),
    "strength infinite": ("--delta-strength", "inf"),
    "guidance": ("--guidance", "nan"),
    "guidance of no name": ("--guidance", "=4"),
    "guidance of another name": ("--guidance", "true_cfg=4"),
    "guidance without a number": ("--guidance", "text=much"),
    "image guidance": ("--image-guidance", "1e300"),
    "backend": ("--backend", "ghost"),
    "variant": ("--variant", "ghost"),
    "no threads": ("--threads", "0"),
    "source": ("--source", "base"),
    "source unknown": ("--source", "ghost=."),
    "deltas missing": ("--deltas", "nothing.safetensors"),
    "prompt": ("--negative-prompt", "\udcff"),
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD.keys())
def test_bad_options(bundle: Path, photo: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    refused("edit", bundle, photo, "a cat", "--out", tmp_path / "out.png", *options)
    assert names(tmp_path) == {"photo.jpg"}


def test_steps_say_what_is_possible(bundle: Path, photo: Path, tmp_path: Path) -> None:
    assert "1 to 12" in refused(
        "edit", bundle, photo, "a cat", "--out", tmp_path / "out.png", "--steps", "13"
    )


@pytest.mark.parametrize("prompt", ["\udcff\udcfe", "a \ud800 b"])
def test_prompt_that_is_no_text(bundle: Path, photo: Path, tmp_path: Path, prompt: str) -> None:
    assert "Unicode" in refused("edit", bundle, photo, prompt, "--out", tmp_path / "out.png")
    assert names(tmp_path) == {"photo.jpg"}


def test_prompt_in_another_encoding(bundle: Path, photo: Path, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 come in as lone surrogates."""
    process = subprocess.run(
        [*COMMAND, "edit", bundle, photo, "caf\xe9".encode("latin-1"), "--out", "out.png"],
        capture_output=True, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    check_refusal(process.returncode, process.stdout, process.stderr)
    assert names(tmp_path) == {"photo.jpg"}


def test_output_over_the_photo(bundle: Path, photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    os.link(photo, tmp_path / "same.jpg")
    for out in (photo, tmp_path / "same.jpg", tmp_path / "." / "photo.jpg"):
        assert "is also" in refused("edit", bundle, photo, "a cat", "--out", out, "--steps", 1)
    assert photo.read_bytes() == before


@pytest.mark.parametrize("out", ["out.gif", "out", "missing/out.png", ".png", "folder.png"])
def test_output_that_cannot_be_written(bundle: Path, photo: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.png").mkdir()
    refused("edit", bundle, photo, "a cat", "--out", tmp_path / out, "--steps", 1)
    assert names(tmp_path) == {"photo.jpg", "folder.png"}


def test_picture_and_deltas_in_one_file(bundle: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    refused("edit", bundle, photo, "a cat", "--out", out, "--save-deltas", out, "--steps", 1)
    assert names(tmp_path) == {"photo.jpg"}


def deltas_of(bundle: Path) -> dict[str, np.ndarray]:
    spec = Manifest.read(bundle).deltas
    assert spec is not None
    return {name: np.ones((1, *shape), np.float32) for name, shape in spec.tensors.items()}


def test_deltas_of_another_model(bundle: Path, lora_bundle: Path, photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    Deltas(deltas_of(lora_bundle)).save(file)
    before = names(tmp_path)
    refused("edit", bundle, photo, "a cat", "--out", tmp_path / "out.png", "--deltas", file)
    refused("deltas", "blend", file, "--bundle", bundle, "--out", tmp_path / "blend.safetensors")
    assert names(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_deltas_that_are_not_finite(bundle: Path, photo: Path, tmp_path: Path, value: float) -> None:
    tensors = deltas_of(bundle)
    name = list(tensors)[3]
    tensors[name].flat[5] = value
    file = tmp_path / "d.safetensors"
    Deltas(tensors).save(file)
    assert name in refused("edit", bundle, photo, "a cat", "--out", tmp_path / "out.png", "--deltas", file)
    assert names(tmp_path) == {"photo.jpg", "d.safetensors"}
    module = name.rpartition(".")[0]
    assert answer("deltas", "show", file)["targets"][module]["norm"] is None
    assert "not finite" in run("deltas", "show", file).stdout


def test_no_deltas(lora_bundle: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert "no generator" in refused("edit", lora_bundle, photo, "a cat", "--steps", 1, "--out", out)
    refused("deltas", "generate", lora_bundle, photo, "a cat", "--out", tmp_path / "d.safetensors")
    assert names(tmp_path) == {"photo.jpg"}
    run("edit", lora_bundle, photo, "a cat", "--steps", 1, "--out", out, "--delta-strength", 0)


numbers = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["0", "1", "2", "12", "1e3", "0x10", "١", "1_0", "", " 3 ", "∞"]),
)
words = st.text(max_size=12).filter(lambda text: "\0" not in text)
sizes = st.one_of(
    words, st.tuples(numbers, numbers).map("x".join), st.sampled_from(["8", "12x8", "8×12", "8,8"])
)
options = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["--steps", "--seed", "--delta-strength", "--guidance", "--threads"]), numbers
        ),
        st.tuples(
            st.sampled_from(["--scheduler", "--backend", "--variant", "--source", "--negative-prompt"]), words
        ),
        st.tuples(st.just("--size"), sizes),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=options, prompt=st.text(max_size=20).filter(lambda text: "\0" not in text))
def test_any_options(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, options: list[tuple[str, str]], prompt: str
) -> None:
    """Whatever is asked, there is a picture and exit code 0, or none and exit code 2 with a reason."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = picture(folder / "photo.png", 8, 8)
    flags = [f"{name}={value}" for name, value in options]
    result = run(
        "edit",
        "--steps=1",
        "--size=8",
        *flags,
        "--out",
        folder / "out.png",
        "--",
        bundle,
        source,
        prompt,
        code=None,
    )
    assert result.exit_code in (0, 2), result.stderr
    assert names(folder) == ({"photo.png", "out.png"} if result.exit_code == 0 else {"photo.png"})
    assert "Internal error" not in result.stderr
    assert result.exit_code == 0 or result.stderr.startswith(("Error: ", "Usage: "))
