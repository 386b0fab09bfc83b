"""Qwen2.5-VL as an encoder of prompts with pictures, for tracing: sizes are free, nothing depends on data.

transformers computes windows, positions and masks from lists of grids, in Python. Here they are computed from
the shapes of the pictures, by operations of the graph; the modules with weights are transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from hywu_export.bundle.sources import read_json_object
from hywu_export.tracing import fake_module
from hywu_runtime.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class PictureSettings:
    """What a pipeline's ``Qwen2VLImageProcessor`` does to a picture.

    Attributes:
        patch, merge, frames: side of a patch, in pixels; patches that make a token, by side; frames that make
            a patch, which a still picture fills by repetition.
        min_area, max_area: of the resized picture, in pixels.
        scale, mean, std: of a value: ``(value * scale - mean) / std``, by channel.
    """

    patch: int
    merge: int
    frames: int
    min_area: int
    max_area: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """Side of a token, in pixels."""
        return self.patch * self.merge

    @classmethod
    def read(cls, folder: Path) -> PictureSettings:
        """The settings in a pipeline's ``processor`` folder.

        Raises:
            CheckpointError: the file is missing or damaged.
            UnsupportedError: the processor leaves out a step, or resamples in another way.
        """
        path = folder / "preprocessor_config.json"
        if not path.exists():  # written by newer libraries
            path = folder / "processor_config.json"
        if not path.exists():
            raise CheckpointError(
                f"{folder} holds no preprocessor_config.json",
                "The pipeline's processor says how the text encoder sees a picture",
                "Fetch the checkpoint whole",
            )
        config = read_json_object(path)
        nested = config.get("image_processor")
        config = nested if isinstance(nested, dict) else config
        expected = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise UnsupportedError(
                    f"{path} sets {key} to {config[key]!r}",
                    f"Expected {value}: pictures are resized (bicubic), rescaled and normalized",
                    "Use the processor that the pipeline was published with",
                )
        size = config.get("size") or {}
        try:
            return cls(
                patch=int(config.get("patch_size", 14)),
                merge=int(config.get("merge_size", 2)),
                frames=int(config.get("temporal_patch_size", 2)),
                min_area=int(config.get("min_pixels") or size.get("shortest_edge") or 56 * 56),
                max_area=int(config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280),
                scale=float(config.get("rescale_factor", 1 / 255)),
                # CLIP's, the class's own defaults.
                mean=tuple(map(float, config.get("image_mean") or (0.48145466, 0.4578275, 0.40821073))),
                std=tuple(map(float, config.get("image_std") or (0.26862954, 0.26130258, 0.27577711))),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} has a value of the wrong type ({error})",
                "Numbers, as Qwen2VLImageProcessor writes them",
                "Fetch the checkpoint whole",
            ) from error


class VisionEncoder(nn.Module):
    """Pictures ``uint8 [B, H, W, 3]``, of whole tokens, to tokens ``[B, rows, columns, C]`` each.

    Most blocks attend within windows of ``window_size`` pixels. The tokens are put in order of windows once,
    each filled up to its full size by copies that nothing attends to; so windows are an axis of the batch.
    """

    def __init__(self, text_encoder: Qwen2_5_VLForConditionalGeneration, settings: PictureSettings):
        super().__init__()
        self.text_encoder = text_encoder
        self.settings = settings

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self._tokens, images))

    def _tokens(self, image: Tensor) -> Tensor:
        visual = self.text_encoder.model.visual
        rows, columns = (size // self.settings.side for size in image.shape[1:3])
        patches = visual.patch_embed.proj.weight.flatten(1)  # a convolution whose steps are its kernel
        x = F.linear(self._patchify(image, rows, columns), patches)
        order = _WindowOrder(rows, columns, visual.window_size // self.settings.side)
        x = x.index_select(1, order.source.flatten())
        # [B, windows, patches of a window, C]
        x = x.reshape(x.shape[0], order.count, -1, x.shape[-1])
        rotary = self._rotary(order, visual.rotary_pos_emb.inv_freq)
        present = order.present.repeat_interleave(self.settings.merge**2, 1)
        for number, block in enumerate(visual.blocks):
            whole = number in visual.fullatt_block_indexes
            x = x + _attend(block.attn, block.norm1(x), rotary, present, whole)
            x = x + block.mlp(block.norm2(x))
        x = visual.merger.ln_q(x)
        x = visual.merger.mlp(x.reshape(x.shape[0], order.count * order.size**2, -1))
        x = x.index_select(1, order.raster.flatten())
        tokens: Tensor = x.reshape(x.shape[0], rows, columns, -1)
        return tokens

    def _patchify(self, image: Tensor, rows: int, columns: int) -> Tensor:
        """``[B, tokens, patches of a token, values of a patch]``."""
        s = self.settings
        x = (image.to(torch.float32) * s.scale - torch.tensor(s.mean)) / torch.tensor(s.std)
        x = x.reshape(-1, rows, s.merge, s.patch, columns, s.merge, s.patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, rows * columns, s.merge**2, 3, 1, s.patch**2)
        return x.expand(-1, -1, -1, -1, s.frames, -1).flatten(3)

    def _rotary(self, order: _WindowOrder, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[windows, patches, 1, head]``: the first half of a head's pairs turns by the
        row, the second by the column."""
        within = torch.arange(self.settings.merge, dtype=torch.float32)
        angles = []
        for token, patch in (
            (order.row, within.repeat_interleave(self.settings.merge)),
            (order.column, within.repeat(self.settings.merge)),
        ):
            place = (token.unsqueeze(-1) * float(self.settings.merge) + patch).flatten(1)
            angles.append(place.unsqueeze(-1) * frequencies.to(torch.float32))
        angle = torch.cat([*angles, *angles], -1).unsqueeze(2)
        return angle.cos(), angle.sin()


class _WindowOrder:
    """The tokens of a picture, ``rows * columns`` of them, in windows of ``size * size``.

    Attributes:
        count: of windows.
        source: int64 ``[count, size²]``: the token, counted along the rows, at each place of a window.
        present: bool, of that shape: whether the place holds a token, not a copy that fills up the window.
        row, column: float32, of that shape: of the place in the picture.
        raster: int64 ``[rows, columns]``: the place of each token.
    """

    def __init__(self, rows: int, columns: int, size: int):
        self.size = size
        high, wide = (rows + size - 1) // size, (columns + size - 1) // size
        self.count = high * wide

        def windows(grid: Tensor) -> Tensor:
            grid = grid.reshape(high, size, wide, size)
            return grid.permute(0, 2, 1, 3).reshape(high * wide, size * size)

        def spread(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
            across = column.unsqueeze(0).expand(row.shape[0], -1)
            down = row.unsqueeze(1).expand(-1, column.shape[0])
            return windows(down), windows(across)

        row, column = torch.arange(high * size), torch.arange(wide * size)
        last_row, last_column = torch.full((), rows - 1), torch.full((), columns - 1)
        inside_row, inside_column = spread(row <= last_row, column <= last_column)
        self.present = inside_row & inside_column
        nearest_row, nearest_column = spread(torch.minimum(row, last_row), torch.minimum(column, last_column))
        self.source = nearest_row * columns + nearest_column
        self.row, self.column = spread(row.to(torch.float32), column.to(torch.float32))
        places = torch.arange(high * wide * size * size).reshape(high, wide, size, size)
        places = places.permute(0, 2, 1, 3).reshape(high * size, wide * size)
        self.raster = places.index_select(0, torch.arange(rows)).index_select(1, torch.arange(columns))


def _attend(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], present: Tensor, whole: bool) -> Tensor:
    """Attention of ``[B, windows, patches, C]``, within windows or, if ``whole``, all to all."""
    batch, windows, patches, width = x.shape
    qkv = attention.qkv(x).reshape(batch, windows, patches, 3, attention.num_heads, -1)
    query, key, value = qkv.unbind(3)
    cos, sin = rotary
    query, key = (y * cos + _rotate_half(y) * sin for y in (query, key))
    if whole:
        shape = (batch, windows * patches, attention.num_heads, -1)
        mask = present.reshape(1, 1, 1, windows * patches)
    else:
        shape = (batch * windows, patches, attention.num_heads, -1)
        mask = present.unsqueeze(0).expand(batch, -1, -1).reshape(batch * windows, 1, 1, patches)
    query, key, value = (y.reshape(shape).transpose(1, 2) for y in (query, key, value))
    made = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    result: Tensor = attention.proj(made.transpose(1, 2).reshape(batch, windows, patches, width))
    return result


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class PromptEncoder(nn.Module):
    """Hidden states of a chat: constant texts and pictures in turn, then a text.

    Inputs: token ids ``[B, L]`` of the last text, padded on the right; pictures ``[B, rows, columns, C]``, as
    `VisionEncoder` gives them. Outputs: hidden states of all texts, one after the other, without the first
    ``drop`` tokens; those of every picture in the form of its input. The model is causal, so padding at the
    end changes no other state; what is at its place means nothing.

    Args:
        texts: token ids of what is before each picture, and at last of what is between the last picture and
            the input.
        drop: tokens at the start whose states are left out; no more than the first text has.
    """

    def __init__(
        self, text_encoder: Qwen2_5_VLForConditionalGeneration, texts: Sequence[Sequence[int]], drop: int
    ):
        super().__init__()
        self.text_encoder = text_encoder
        self.drop = drop
        self.texts = [torch.tensor(ids, dtype=torch.int64).unsqueeze(0) for ids in texts]

    def forward(self, input_ids: Tensor, *pictures: Tensor) -> tuple[Tensor, ...]:
        language = self.text_encoder.model.language_model
        batch = input_ids.shape[0]
        parts: list[Tensor] = []
        positions: list[Tensor] = []  # [3, tokens] each: time, row, column
        start = torch.zeros(())
        for text, picture in zip(self.texts, pictures):
            parts.append(language.embed_tokens(text).expand(batch, -1, -1))
            positions.append((start + torch.arange(text.shape[1])).unsqueeze(0).expand(3, -1))
            start = start + float(text.shape[1])
            place, extent = _grid_positions(picture.shape[1], picture.shape[2])
            parts.append(picture.flatten(1, 2))
            positions.append(start + place)
            start = start + extent
        ids = torch.cat([self.texts[-1].expand(batch, -1), input_ids], 1)
        parts.append(language.embed_tokens(ids))
        positions.append((start + torch.arange(ids.shape[1])).unsqueeze(0).expand(3, -1))
        x = torch.cat(parts, 1)
        index = torch.arange(x.shape[1])
        causal = (index.unsqueeze(0) <= index.unsqueeze(1)).unsqueeze(0).unsqueeze(0)
        hidden = language(
            inputs_embeds=x,
            position_ids=torch.cat(positions, 1).unsqueeze(1),
            attention_mask={"full_attention": causal},
            use_cache=False,
        ).last_hidden_state
        states, begin = [], 0
        for part in parts:  # not split(): ONNX has none for so many free sizes
            end = begin + part.shape[1]
            states.append(hidden.index_select(1, torch.arange(begin, end)))
            begin = end
        texts = torch.cat([states[0][:, self.drop :], *states[2::2]], 1)
        return texts, *(state.reshape(picture.shape) for state, picture in zip(states[1::2], pictures))


def _grid_positions(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Positions ``[3, rows * columns]`` of a picture's tokens from 0, and how far the next text is from 0."""
    row, column = torch.arange(rows, dtype=torch.float32), torch.arange(columns, dtype=torch.float32)
    down, across = row.unsqueeze(1).expand(-1, columns), column.unsqueeze(0).expand(rows, -1)
    grid = (torch.zeros_like(down), down, across)
    extent = torch.maximum(
        torch.full((), rows, dtype=torch.float32), torch.full((), columns, dtype=torch.float32)
    )
    return torch.stack(grid).flatten(1), extent


def assemble(texts: Tensor, pictures: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The sequence ``[B, S, C]`` of what `PromptEncoder` gives apart: ``lengths`` of all texts but the last,
    in tokens."""
    parts, begin = [], 0
    for picture, length in zip(pictures, lengths):
        parts += [texts[:, begin : begin + length], picture.flatten(1, 2)]
        begin += length
    return torch.cat([*parts, texts[:, begin:]], 1)


def make_text_encoder(config: Mapping[str, Any]) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a ``config.json``, without data, and without the head that predicts tokens.

    Raises:
        UnsupportedError: it is another model, or attends within a sliding window.
    """
    kind = config.get("model_type")
    if kind not in (None, "qwen2_5_vl"):
        raise UnsupportedError(
            f"The text encoder is a {kind}",
            "This pipeline's text encoder is Qwen2.5-VL (qwen2_5_vl)",
            "Export a pipeline with that text encoder",
        )
    settings = Qwen2_5_VLConfig.from_dict(dict(config))
    settings._attn_implementation = "sdpa"
    if set(settings.text_config.layer_types) != {"full_attention"}:
        raise UnsupportedError(
            "The text encoder attends within a sliding window",
            "Qwen2.5-VL as the pipelines use it attends to all tokens before",
            "Set use_sliding_window to false in its config.json",
        )

    def make() -> Qwen2_5_VLForConditionalGeneration:
        model = Qwen2_5_VLForConditionalGeneration(settings)
        model.lm_head = nn.Identity()
        return model

    return fake_module(make)
