"""Encoders that make a generator's condition from what the base model already computes.

An encoder lies in ``condition_encoder/`` beside the generator's ``config.json``: its own ``config.json``,
which names its class, and ``model.safetensors``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_export.bundle.sources import read_json_object
from hywu_runtime.errors import CheckpointError

from .checkpoint import CONFIG_FILE, checkpoint_folder, load_weights, meta_module, save_checkpoint

FOLDER = "condition_encoder"
_CLASS_KEY = "_class_name"
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class TextImageConditionConfig:
    """Sizes of a `TextImageConditionEncoder`.

    Attributes:
        text_dim: channels of the text encoder's hidden states.
        latent_channels: channels of the image latents.
        output_dim: channels of the condition, the generator's ``input_dim``.
        grid: side that latents are resized to, so that every image size gives the same number of tokens.
        patch: side of the square of latents that makes one token; divides ``grid``.
    """

    text_dim: int
    latent_channels: int
    output_dim: int
    grid: int = 8
    patch: int = 2

    def __post_init__(self) -> None:
        remedy = "give sizes that belong together"
        for name, size in asdict(self).items():
            if type(size) is not int or not 0 < size <= _MAX_SIZE:
                raise CheckpointError(f"{name} is {brief(size)}", f"an integer from 1 to {_MAX_SIZE}", remedy)
        if self.grid % self.patch:
            wrong = f"grid is {self.grid} and patch is {self.patch}"
            raise CheckpointError(wrong, "grid to be a multiple of patch", remedy)

    @classmethod
    def from_file(cls, path: str | Path) -> TextImageConditionConfig:
        """Read ``config.json``; keys with a leading underscore are not sizes and are ignored.

        Raises:
            CheckpointError: the file is missing or damaged, a size is missing, unknown or not sensible.
        """
        data = {key: value for key, value in read_json_object(path).items() if not key.startswith("_")}
        known = {field.name for field in fields(cls)}
        try:
            if data.keys() != known:
                raise CheckpointError(
                    f"missing or unknown: {', '.join(sorted(data.keys() ^ known))}",
                    f"the keys {', '.join(sorted(known))}",
                    "save the condition encoder again",
                )
            return cls(**data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.wrong}", error.expected, error.remedy) from error


class TextImageConditionEncoder(nn.Module):
    """Text tokens, then image-latent patches: a Linear and a learned type embedding for each kind."""

    def __init__(self, config: TextImageConditionConfig):
        super().__init__()
        self.config = config
        side = config.grid // config.patch
        self.text_in = nn.Linear(config.text_dim, config.output_dim)
        # The linear projection of patches, as the convolution that cuts and projects at once.
        self.image_in = nn.Conv2d(
            config.latent_channels, config.output_dim, config.patch, stride=config.patch
        )
        self.type_embedding = nn.Embedding(2, config.output_dim)
        self.patch_position = nn.Embedding(side * side, config.output_dim)
        for embedding in (self.type_embedding, self.patch_position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text_hidden: Tensor, latents: Tensor) -> Tensor:
        """Make the condition.

        Args:
            text_hidden: ``[B, L, text_dim]``.
            latents: ``[B, latent_channels, h, w]``, of any size.

        Returns:
            ``[B, L + (grid / patch)², output_dim]``.
        """
        text_type, image_type = self.type_embedding.weight.unbind(0)
        size = (self.config.grid, self.config.grid)
        resized = F.interpolate(latents, size=size, mode="bilinear", align_corners=False)
        patches = self.image_in(resized).flatten(2).transpose(1, 2) + self.patch_position.weight + image_type
        return torch.cat([self.text_in(text_hidden) + text_type, patches], dim=1)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32
    ) -> TextImageConditionEncoder:
        """Load a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: the folder or one of its files is missing, damaged or inconsistent.
        """
        config = TextImageConditionConfig.from_file(checkpoint_folder(path) / CONFIG_FILE)
        return load_weights(path, meta_module(cls, config), dtype)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder ``path``.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        save_checkpoint(path, {_CLASS_KEY: type(self).__name__, **asdict(self.config)}, self, dtype)


ENCODERS: dict[str, Any] = {
    "TextImageConditionEncoder": TextImageConditionEncoder,
}


def load_condition_encoder(
    generator_dir: str | Path, dtype: torch.dtype = torch.float32
) -> TextImageConditionEncoder | None:
    """The condition encoder of a generator, or None where it has none and its condition comes from elsewhere.

    Raises:
        CheckpointError: there is one, but it is damaged, inconsistent or of an unknown class.
    """
    folder = checkpoint_folder(generator_dir) / FOLDER
    if not folder.exists():
        return None
    name = read_json_object(checkpoint_folder(folder) / CONFIG_FILE).get(_CLASS_KEY)
    if not isinstance(name, str) or name not in ENCODERS:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names the class {name!r}",
            f"one of {', '.join(ENCODERS)}",
            "use a version that knows this class",
        )
    encoder: TextImageConditionEncoder = ENCODERS[name].from_pretrained(folder, dtype)
    return encoder
