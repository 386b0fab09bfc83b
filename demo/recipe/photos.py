"""The photographs: where they come from, under which licence, and random crops of them.

Only images that ordinary packages ship under a licence that allows it. ``python -m demo.recipe.photos
--out DIR`` gathers them: pip packages are read where they are installed, Debian packages are fetched with
``apt-get download`` and unpacked without being installed.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SHORT_SIDE = 768  # pixels; enough for every crop the training takes


@dataclass(frozen=True)
class Photo:
    """One photograph: ``package`` (``pip:`` or ``deb:``), the file in it, licence, author, split."""

    package: str
    file: str
    licence: str
    author: str
    heldout: bool = False

    @property
    def stem(self) -> str:
        return Path(self.file).stem


_SKIMAGE = "pip:scikit-image"
_SKLEARN = "pip:scikit-learn"
_L16 = "deb:lomiri-wallpapers-16.04"
_L20 = "deb:lomiri-wallpapers-20.04"
_BG = "usr/share/backgrounds/"

PHOTOS: tuple[Photo, ...] = (
    Photo(_SKIMAGE, "skimage/data/astronaut.png", "public domain", "NASA", True),
    Photo(_SKIMAGE, "skimage/data/chelsea.png", "CC0-1.0", "Stefan van der Walt", True),
    Photo(_SKIMAGE, "skimage/data/coffee.png", "CC0-1.0", "Rachel Michetti", True),
    Photo(_SKIMAGE, "skimage/data/rocket.jpg", "CC0-1.0", "SpaceX", True),
    Photo(_SKLEARN, "sklearn/datasets/images/flower.jpg", "CC-BY-2.0", "danielbuechele, vultilion", True),
    Photo(_L16, _BG + "picosdeeuropa_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi", True),
    Photo(_SKLEARN, "sklearn/datasets/images/china.jpg", "CC-BY-2.0", "danielbuechele"),
    Photo(_SKIMAGE, "skimage/data/hubble_deep_field.jpg", "public domain", "NASA"),
    Photo(_SKIMAGE, "skimage/data/retina.jpg", "CC0-1.0", "Häggström"),
    Photo(_SKIMAGE, "skimage/data/ihc.png", "public domain", "Human Protein Atlas volunteers"),
    Photo(_L16, _BG + "Bridge_by_Sander_Klootwijk.jpg", "CC-BY-SA-4.0", "Sander Klootwijk"),
    Photo(_L16, _BG + "Dragonfly_by_Bolly.jpg", "CC-BY-SA-4.0", "Bolly"),
    Photo(_L16, _BG + "Picture_0B_by_freespace.jpg", "CC-BY-4.0", "Trevor 'Freespace'"),
    Photo(_L16, _BG + "Picture_1A_by_freespace.jpg", "CC-BY-4.0", "Trevor 'Freespace'"),
    Photo(_L16, _BG + "Wine_by_Jakkub_Mede.jpg", "CC-BY-4.0", "Jakub Mede"),
    Photo(_L16, _BG + "aitzgorri_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    Photo(_L16, _BG + "analogpattern_by_Peter_Nerlich.jpg", "CC-BY-SA-4.0", "Peter Nerlich"),
    Photo(_L16, _BG + "free_by_Peter_Nerlich.jpg", "CC-BY-SA-4.0", "Peter Nerlich"),
    Photo(_L16, _BG + "friends_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    Photo(_L16, _BG + "greentock_by_Peter_Nerlich.jpg", "CC-BY-SA-4.0", "Peter Nerlich"),
    Photo(_L16, _BG + "life_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    Photo(_L16, _BG + "seeding_by_Clements_Engelhardt.jpg", "CC0-1.0", "Clemens Engelhardt"),
    Photo(_L16, _BG + "sunset_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    Photo(_L16, _BG + "umang_by_Abhishek_Mudgal.jpg", "CC-BY-4.0", "Abhishek Mudgal"),
    Photo(_L20, _BG + "Fossa_by_Jasper_Roks.jpg", "CC-BY-SA-3.0", "Jasper Roks"),
    Photo(_L20, _BG + "Infinite-Sea_by_Aury88.jpg", "CC-BY-SA-3.0", "Aury88"),
    Photo(_L20, _BG + "Kleiber_by_Lukas_Baubkus.jpg", "CC-BY-SA-3.0", "Lukas Baubkus"),
    Photo(_L20, _BG + "Painting-Colors_by__herobrine7gamer.jpg", "CC-BY-SA-3.0", "herobrine7gamer"),
)


def _package_root(package: str, scratch: Path) -> Path:
    kind, name = package.split(":")
    if kind == "pip":
        import importlib.metadata

        return Path(str(importlib.metadata.distribution(name).locate_file("")))
    root = scratch / name
    if not root.exists():
        subprocess.run(["apt-get", "download", name], cwd=scratch, check=True)
        (archive,) = scratch.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def gather(out: Path) -> None:
    """Write every photograph to ``out/{train,heldout}/NAME.png``, its short side at most 768 pixels."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch:
        for photo in PHOTOS:
            target = out / ("heldout" if photo.heldout else "train") / f"{photo.stem}.png"
            if target.exists():
                continue
            image = Image.open(_package_root(photo.package, Path(scratch)) / photo.file)
            image = image.convert("RGB")
            factor = min(1.0, SHORT_SIDE / min(image.size))
            size = (round(image.width * factor), round(image.height * factor))
            target.parent.mkdir(parents=True, exist_ok=True)
            image.resize(size, Image.Resampling.LANCZOS).save(target)


def load(folder: Path) -> list[np.ndarray]:
    """The photographs of ``folder`` in the order of their names, each ``uint8 [H, W, 3]``."""
    from PIL import Image

    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def random_crop(
    photo: np.ndarray, size: int, rng: np.random.Generator, scale: tuple[float, float] = (0.25, 1.0)
) -> torch.Tensor:
    """A random square of ``photo``, resized to ``float32 [3, size, size]`` in 0..1.

    The square's side is ``scale`` times the short side (uniform in its logarithm); it is mirrored, its
    channels permuted and its gamma changed at random, because a few photographs must stand for many.
    """
    import torch
    from PIL import Image

    height, width, _ = photo.shape
    low, high = np.log(scale[0]), np.log(scale[1])
    side = max(size, int(min(height, width) * np.exp(rng.uniform(low, high))))
    side = min(side, height, width)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    square = Image.fromarray(photo[top : top + side, left : left + side])
    x = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    if rng.random() < 0.5:
        x = x[:, ::-1]
    if rng.random() < 0.3:
        x = x[:, :, rng.permutation(3)]
    x = x ** np.exp(rng.uniform(-0.4, 0.4))
    return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1), np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    gather(parser.parse_args().out)


if __name__ == "__main__":
    main()
