"""Several photos in a request, and tensors that show a photo at a size of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_pictures
from PIL import Image

from hywu_runtime import Editor, Manifest
from hywu_runtime.errors import BundleError, InputError
from hywu_runtime.images import working_size
from hywu_runtime.manifest import ImagePolicy

Show = Callable[[str], Editor]


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """``show(tensor)``: an editor whose pictures are what that tensor shows."""
    editors: dict[str, Editor] = {}

    def get(name: str) -> Editor:
        if name not in editors:
            folder = tmp_path_factory.mktemp("pictures") / name
            toy_pictures.write_bundle(folder, name)
            editors[name] = Editor.load(folder, "ort-cpu")
        return editors[name]

    yield get
    for editor in editors.values():
        editor.close()


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), np.uint8)


def by_pillow(pixels: np.ndarray, *steps: tuple[tuple[int, int], Image.Resampling]) -> np.ndarray:
    image = Image.fromarray(pixels)
    for size, kind in steps:
        image = image.resize(size, kind)
    return np.asarray(image)


LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC


def test_each_photo_has_its_own_working_size(show: Show) -> None:
    photos = [photo(30, 60), photo(100, 50, 1)]
    # 64 x 64 pixels in the photos' aspects, in steps of 8; the first is enlarged.
    expected = by_pillow(photos[0], ((48, 88), LANCZOS))
    np.testing.assert_array_equal(show("image_1").edit(photos, "", output="array"), expected)
    expected = by_pillow(photos[1], ((88, 48), LANCZOS))
    np.testing.assert_array_equal(show("image").edit(photos, "", output="array"), expected)


def test_an_explicit_size_is_that_of_one_photo(show: Show) -> None:
    photos = [photo(30, 60), photo(100, 50, 1)]
    assert show("image").edit(photos, "", size=(24, 40), output="array").shape == (40, 24, 3)
    assert show("image_1").edit(photos, "", size=(24, 40), output="array").shape == (88, 48, 3)


def test_a_working_picture_is_resized_again(show: Show) -> None:
    photos = [photo(30, 60), photo(100, 50, 1)]
    got = show("seen").edit(photos, "", output="array")
    # 88 x 48 is 91 x 49 in steps of 7, above the most pixels: 3600 in this aspect, rounded down.
    shrink = math.sqrt(88 * 48 / 3600)
    size = (math.floor(88 / shrink / 7) * 7, math.floor(48 / shrink / 7) * 7)
    expected = by_pillow(photos[1], ((88, 48), LANCZOS), (size, BICUBIC))
    np.testing.assert_array_equal(got, expected)
    got = show("seen").edit(photos, "", size=(32, 32), output="array")
    np.testing.assert_array_equal(got, by_pillow(photos[1], ((32, 32), LANCZOS), ((56, 56), BICUBIC)))


def test_a_whole_photo_is_resized_in_steps(show: Show) -> None:
    photos = [photo(120, 45), photo(100, 50, 1)]
    got = show("small").edit(photos, "", output="array")
    # 48² pixels in steps of 16; in steps of 7 these are above 1000, hence rounded down.
    wide = (round(120 / math.sqrt(120 * 45 / 2304) / 16) * 16, 32)
    assert wide == (80, 32)
    shrink = math.sqrt(80 * 32 / 1000)
    size = (math.floor(80 / shrink / 7) * 7, math.floor(32 / shrink / 7) * 7)
    np.testing.assert_array_equal(got, by_pillow(photos[0], (wide, LANCZOS), (size, BICUBIC)))


def test_a_batch_has_the_sizes_of_its_first_request(show: Show) -> None:
    first, second = [photo(30, 60), photo(100, 50)], [photo(80, 80, 2), photo(20, 90, 3)]
    for name in toy_pictures.TENSORS:
        editor = show(name)
        alone = editor.edit(first, "", output="array")
        both = editor.edit_batch([(first, ""), (second, "")], output="array")
        np.testing.assert_array_equal(both[0], alone)
        assert both[1].shape == alone.shape


def test_the_number_of_photos_is_the_bundles(show: Show) -> None:
    editor = show("image")
    assert editor.limits().photos == 2
    for photos in (photo(8, 8), [photo(8, 8)], [photo(8, 8)] * 3):
        with pytest.raises(InputError, match="takes 2 for each"):
            editor.edit(photos, "")
    with pytest.raises(InputError, match="missing"):
        editor.edit_batch([([photo(8, 8)] * 2, ""), (None, "")])


def test_a_size_beyond_all_photos(show: Show, tmp_path: Path) -> None:
    value = toy_pictures.write_bundle(tmp_path / "bundle", "small").to_dict()
    value["tensors"]["small"]["resize"][0]["area"] = 2**30
    (tmp_path / "bundle" / "manifest.json").write_text(Manifest.from_dict(value).dumps())
    with (
        Editor.load(tmp_path / "bundle", "ort-cpu") as editor,
        pytest.raises(InputError, match="at most"),
    ):
        editor.edit([photo(8, 8)] * 2, "")


def test_enlarging(show: Show) -> None:
    plain = ImagePolicy("image", 8, 8, 512, 4096)
    assert working_size(20, 30, plain) == (24, 32)
    assert working_size(20, 30, ImagePolicy("image", 8, 8, 512, 4096, enlarge=True)) == (56, 80)


REFUSED: list[tuple[str, Callable[[Any], Any]]] = [
    ("index", lambda t: t["image"].update(index=64)),
    ("index", lambda t: t["image"].update(index=-1)),
    ("from", lambda t: t["seen"].update({"from": "nothing"})),
    ("from", lambda t: t["seen"].update({"from": "image_1"})),
    ("from", lambda t: t["seen"].update({"from": "small", "index": 0})),
    ("resize", lambda t: t["seen"].pop("resize")),
    ("filter", lambda t: t["seen"]["resize"][0].update(filter="nearest")),
    ("multiple", lambda t: t["seen"]["resize"][0].update(multiple=0)),
    ("min_area", lambda t: t["seen"]["resize"][0].update(min_area=9000)),
]


@pytest.mark.parametrize(("key", "change"), REFUSED)
def test_manifests_that_are_refused(key: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    value = toy_pictures.write_bundle(tmp_path / "bundle", "image").to_dict()
    assert Manifest.from_dict(copy.deepcopy(value)).to_dict() == value
    change(value["tensors"])
    with pytest.raises(BundleError, match=key):
        Manifest.from_dict(value)
