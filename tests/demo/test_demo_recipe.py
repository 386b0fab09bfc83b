"""The recipe of the demo: exact operations, tokenizer, and a training that survives being killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import ndimage

from demo.recipe import operations, photos, train_vae, training
from demo.recipe.tokenizer import MAX_LENGTH, train_tokenizer


def random_picture(size: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def applied(name: str, pixels: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
    return operations.apply(name, x)[0].permute(1, 2, 0).numpy() * 255


def test_point_operations_are_those_of_pillow() -> None:
    pixels = random_picture()
    image = Image.fromarray(pixels)
    inverted = np.asarray(ImageOps.invert(image), np.float32)
    gray = np.asarray(image.convert("L"), np.float32)[..., None].repeat(3, -1)
    swapped = np.asarray(Image.merge("RGB", image.split()[::-1]), np.float32)
    np.testing.assert_allclose(applied("invert", pixels), inverted, atol=1e-3)
    np.testing.assert_allclose(applied("grayscale", pixels), gray, atol=1.0)
    np.testing.assert_allclose(applied("swap", pixels), swapped, atol=1e-3)


def test_blur_is_a_gaussian() -> None:
    pixels = random_picture()
    expected = ndimage.gaussian_filter(pixels.astype(np.float32), (3, 3, 0), mode="nearest", truncate=3.0)
    np.testing.assert_allclose(applied("blur", pixels), expected, atol=0.2)


def test_instructions_conflict_and_are_told_apart() -> None:
    assert len(operations.OPERATIONS) >= 8
    pixels = random_picture()
    results = {operation.name: applied(operation.name, pixels) for operation in operations.OPERATIONS}
    for name, result in results.items():
        assert result.min() >= 0
        assert result.max() <= 255
        assert all(np.abs(result - other).mean() > 5 for key, other in results.items() if key != name)
    phrasings = [text for operation in operations.OPERATIONS for text in operation.phrasings]
    assert len(set(phrasings)) == len(phrasings)


def test_tokenizer_takes_any_text_and_knows_its_words(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    train_tokenizer(["make it sepia", "blur the photo"], tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == MAX_LENGTH
    assert len(tokenizer("make it sepia").input_ids) == 2 + 3
    ids = tokenizer("变成 sépia 🎞").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "变成sépia🎞"


def test_photographs_have_a_licence_and_are_not_in_both_splits() -> None:
    assert len({photo.stem for photo in photos.PHOTOS}) == len(photos.PHOTOS)
    assert all(photo.licence and photo.author for photo in photos.PHOTOS)
    shown = {path.stem for path in (Path(photos.__file__).parents[1] / "photos").glob("*.jpg")}
    assert len(shown) == sum(photo.heldout for photo in photos.PHOTOS)


def test_random_crop_is_reproducible() -> None:
    picture = random_picture(96)
    first, again = (photos.random_crop(picture, 32, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 32, 32)
    assert 0 <= first.min() < first.max() <= 1


def test_a_killed_training_ends_as_if_it_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "train").mkdir(parents=True)
    Image.fromarray(random_picture(96)).save(tmp_path / "photos" / "train" / "noise.png")
    monkeypatch.setattr(train_vae, "BATCH", 2)
    monkeypatch.setattr(training.Checkpoint.__init__, "__defaults__", (0.0,))

    def train(name: str) -> Path:
        out = tmp_path / name
        arguments = ["--photos", tmp_path / "photos", "--work", out / "work", "--out", out, "--steps", 4]
        monkeypatch.setattr("sys.argv", ["train_vae", *map(str, arguments)])
        train_vae.main()
        return out / "vae" / "diffusion_pytorch_model.safetensors"

    whole = train("whole").read_bytes()

    saved = training.Checkpoint.save

    def save_and_die(self: training.Checkpoint, step: int, force: bool = False) -> None:
        saved(self, step, force)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    monkeypatch.setattr(training.Checkpoint, "save", saved)
    assert train("killed").read_bytes() == whole
