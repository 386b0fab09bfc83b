"""Photographs, prompts and the draw of samples."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hywu_calibration.samples import draw_samples, find_photographs, read_prompts, scales_for
from hywu_runtime.errors import InputError
from hywu_runtime.manifest import Guidance, ImagePolicy, is_guided

POLICY = ImagePolicy(tensor="image", multiple=16, min=32, max=256, default_area=64 * 64)
PIX2PIX = (Guidance("text", 7.5, above=1.0), Guidance("image", 1.5, at_least=1.0))
PLAIN = (Guidance("text", 1.0, above=1.0), Guidance("image", 1.0, at_least=1.0))
DISTILLED = (Guidance("distilled", 2.5), Guidance("text", 1.0, above=1.0))


def photo(path: Path, size: tuple[int, int] = (96, 64)) -> Path:
    Image.new("RGB", size, (200, 80, 10)).save(path)
    return path


def check_three_parts(error: InputError) -> None:
    assert error.wrong
    assert error.expected
    assert error.remedy


def test_broken_pictures_are_named_and_skipped(tmp_path: Path) -> None:
    good = [photo(tmp_path / "b.png"), photo(tmp_path / "c.JPG")]
    (tmp_path / "a.jpg").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "README.md").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    found = find_photographs(tmp_path, POLICY)
    assert found.paths == tuple(good)
    ((file, reason),) = found.skipped
    assert file.name == "a.jpg"
    assert "a.jpg" in reason


def test_folders_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(b"broken")
    empty = tmp_path / "empty"
    empty.mkdir()

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for folder, word in (
        (tmp_path / "none", "No such"),
        (tmp_path / "x.png", "Not a dir"),
        (empty, "has none"),
        (tmp_path, "x.png"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            find_photographs(folder, POLICY)
        check_three_parts(caught.value)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        find_photographs(tmp_path, POLICY)


@pytest.mark.parametrize("content", ["a\nb\n", "a\r\nb", "﻿a\n\n  \nb\n"])
def test_prompts(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content.encode())
    assert read_prompts(file) == ("a", "b")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("ok\ncafé".encode("latin-1"), "byte 4 of line 2 is 0xe9"),
        ("ok".encode("utf-16"), "byte 1 of line 1 is 0xff"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (None, "No such file"),
    ],
)
def test_bad_prompts(tmp_path: Path, content: bytes | None, word: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=word) as caught:
        read_prompts(file)
    check_three_parts(caught.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    return [photo(folder / f"{i}.png", size) for i, size in enumerate([(96, 64), (64, 96), (400, 100)])]


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 5))
def test_photos_prompts_and_steps_are_used_evenly(
    photos: list[Path], count: int, seed: int, evaluations: int, prompts: int
) -> None:
    texts = [f"p{i}" for i in range(prompts)]

    def draw() -> list:
        return draw_samples(
            photos, texts, count, seed, evaluations=evaluations, guidance=PIX2PIX, forms=(True, False),
            policy=POLICY,
        )  # fmt: skip

    samples = draw()
    assert samples == draw()
    for values, of in (([s.photo for s in samples], photos), ([s.prompt for s in samples], texts)):
        uses = [Counter(values)[item] for item in of]
        assert max(uses) - min(uses) <= 1
    looked_at = [e for s in samples for e in s.evaluations]
    assert all(0 <= e < evaluations for e in looked_at)
    if (
        count >= 16 and evaluations % 2 == 0
    ):  # both halves of the trajectory are looked at about equally often
        share = np.histogram((np.array(looked_at) + 0.5) / evaluations, 2, (0, 1))[0] / len(looked_at)
        assert abs(share[0] - share[1]) < 0.4
    assert {s.guided for s in samples[:8]} == ({True, False} if count >= 4 else {True})
    assert all(s.size is None or s.size[0] % POLICY.multiple == 0 for s in samples)
    assert len({s.size for s in samples[:6]}) > 1 or count < 3


def test_another_seed_gives_other_samples(photos: list[Path]) -> None:
    first, second = (draw_samples(photos, ["a", "b"], 8, seed, evaluations=4) for seed in (0, 1))
    assert [s.seed for s in first] != [s.seed for s in second]


@pytest.mark.parametrize("guidance", [PIX2PIX, PLAIN, DISTILLED])
def test_scales_for_both_forms(guidance: tuple[Guidance, ...]) -> None:
    for guided in (True, False):
        scales = dict(scales_for(guidance, guided))
        assert all(g.satisfied(scales[g.name]) for g in guidance if g.decides) == guided
    default = is_guided(guidance)
    assert dict(scales_for(guidance, default)) == {g.name: g.default for g in guidance}
