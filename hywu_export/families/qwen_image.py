"""Graphs of the Qwen-Image editors: the denoiser with the latents of pictures behind its own, and the VAE.

The denoiser's forward is written anew around diffusers' blocks: with real numbers in place of complex ones in
the rotary embedding, and sizes that stay free. The VAE is one of videos; a picture is its first frame, for
which a causal convolution in three dimensions sees zeros before it: that is one in two dimensions, with the
last slice of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageRMS_norm,
    QwenImageUpsample,
)
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.pixels import from_pixels, to_pixels
from hywu_export.families.qwen_vl import assemble
from hywu_export.families.tiling import Tiles, in_tiles
from hywu_export.schedules import Shift, euler
from hywu_export.tracing import fake_module
from hywu_runtime.errors import UnsupportedError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines ``[tokens, 1, head / 2]`` of the angles by which the pairs of a head turn."""


class ImageEncoder(nn.Module):
    """Pictures ``uint8 [B, H, W, 3]`` to normalized latents ``[B, C, h, w]``, the mode of the posterior."""

    def __init__(self, vae: AutoencoderKLQwenImage, tiles: Tiles | None = None):
        super().__init__()
        self.vae = vae
        self.tiles = tiles

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self._latents, images))

    def _latents(self, image: Tensor) -> Tensor:
        def mode(part: Tensor) -> Tensor:
            moments = self.vae.quant_conv(self.vae.encoder(part.unsqueeze(2))).squeeze(2)
            latents: Tensor = moments.chunk(2, 1)[0]
            return latents

        pixels = from_pixels(image)
        factor = pixels_per_latent(self.vae)
        mean = mode(pixels) if self.tiles is None else in_tiles(mode, pixels, self.tiles, factor, 1)
        return (mean - _channels(self.vae.config.latents_mean)) / _channels(self.vae.config.latents_std)


class ImageDecoder(nn.Module):
    """Latents ``[B, C, h, w]`` to pixels ``uint8 [B, H, W, 3]``."""

    def __init__(self, vae: AutoencoderKLQwenImage, tiles: Tiles | None = None):
        super().__init__()
        self.vae = vae
        self.tiles = tiles

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        config = self.vae.config
        # As the pipeline computes it: divided by the reciprocal.
        z = latents / (1.0 / _channels(config.latents_std)) + _channels(config.latents_mean)

        def picture(part: Tensor) -> Tensor:
            image: Tensor = self.vae.decoder(self.vae.post_quant_conv(part.unsqueeze(2))).squeeze(2)
            return image

        factor = pixels_per_latent(self.vae)
        return (to_pixels(picture(z) if self.tiles is None else in_tiles(picture, z, self.tiles, 1, factor)),)


def pixels_per_latent(vae: AutoencoderKLQwenImage) -> int:
    """Of one side."""
    return int(2 ** len(vae.temperal_downsample))


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def _length(x: Tensor, dim: int) -> Tensor:
    """Euclidean, with the dimension kept. Of powers, which stay in FP32 where the rest is FP16."""
    return x.pow(2).sum(dim, keepdim=True).sqrt()


class Step(nn.Module):
    """One evaluation of the transformer with its deltas, guidance, and the sampler's update.

    Inputs: latents ``[B, C, h, w]``, coefficients ``[3]`` (`Shift.levels`), gate ``[B]``, latents of every
    picture; then of the prompt the mask ``[B, L]`` of its tokens, the states of texts ``[B, T, C]`` and those
    of every picture ``[B, rows, columns, C]``; if guided, the same of the negative prompt, and the scale
    ``[B]``; at last the deltas in the order of ``spec.tensors()``.

    Args:
        lengths: tokens before each picture, as `assemble` takes them.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        spec: DeltaSpec,
        shift: Shift,
        lengths: Sequence[int],
        guided: bool,
    ):
        super().__init__()
        self.transformer = transformer
        self.names = tuple(spec.tensors())
        self.injection = inject(transformer, spec)
        self.shift = shift
        self.lengths = tuple(lengths)
        self.guided = guided

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, coefficients, gate, *rest = inputs[:cut]
        count = len(self.lengths)
        pictures, prompts = rest[:count], rest[count:]
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        level, after = self.shift.levels(coefficients, height * width)
        with self.injection as injection:
            injection.set(deltas, gate, rows=2 if self.guided else 1)
            output = self._predict(latents, level, pictures, prompts)
        return (euler(latents, _unpack(output, height, width), level, after),)

    def _predict(
        self, latents: Tensor, level: Tensor, pictures: Sequence[Tensor], prompts: Sequence[Tensor]
    ) -> Tensor:
        """The model output ``[B, tokens, 4 C]`` for the latents, guided."""
        shapes = [(x.shape[2] // 2, x.shape[3] // 2) for x in (latents, *pictures)]
        x = torch.cat([_pack(x) for x in (latents, *pictures)], 1)
        size = len(self.lengths) + 2  # tensors of a prompt
        states, mask = self._prompt(prompts[:size])
        if self.guided:
            x = torch.cat([x, x])
            others, other_mask = self._prompt(prompts[size:-1])
            states, mask = torch.cat([states, others]), torch.cat([mask, other_mask])
        made = denoise(self.transformer, x, shapes, states, mask, level.expand(x.shape[0]))
        made = made[:, : shapes[0][0] * shapes[0][1]]
        if not self.guided:
            return made
        # Not chunk(2): it would freeze the batch.
        with_prompt, without = made.reshape(2, -1, *made.shape[1:]).unbind(0)
        combined = without + prompts[-1][:, None, None] * (with_prompt - without)
        return combined * (_length(with_prompt, -1) / _length(combined, -1))

    def _prompt(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """States ``[B, S, C]`` of a prompt, and which of them are no padding: bool ``[B, S]``."""
        mask, texts, *pictures = parts
        states = assemble(texts, pictures, self.lengths)
        before = torch.ones((states.shape[0], states.shape[1] - mask.shape[1]), dtype=torch.bool)
        return states, torch.cat([before, mask > 0], 1)


def denoise(
    model: QwenImageTransformer2DModel,
    latents: Tensor,
    shapes: Sequence[tuple[int, int]],
    prompt: Tensor,
    mask: Tensor,
    level: Tensor,
) -> Tensor:
    """The transformer's output ``[B, tokens, 4 C]``.

    Args:
        latents: ``[B, tokens, 4 C]``: those to denoise, then those of pictures, packed.
        shapes: rows and columns of each of them, in tokens.
        prompt: ``[B, S, C]``, with its mask, bool ``[B, S]``.
        level: noise level ``[B]``, 0…1.
    """
    image, text = model.img_in(latents), model.txt_in(model.txt_norm(prompt))
    embedded, still = model.time_text_embed(level, image), None
    if model.config.zero_cond_t:  # pictures are modulated as at the noise level 0
        still = model.time_text_embed(torch.zeros_like(level), image)
    changing = torch.arange(image.shape[1]) < torch.full((), shapes[0][0] * shapes[0][1])
    rotary = rotary_embedding(model, shapes, prompt.shape[1])
    for block in model.transformer_blocks:
        image, text = _block(block, image, text, mask, rotary, embedded, still, changing)
    result: Tensor = model.proj_out(model.norm_out(image, embedded))
    return result


def _block(
    block: Any,
    image: Tensor,
    text: Tensor,
    mask: Tensor,
    rotary: tuple[Rotary, Rotary],
    embedded: Tensor,
    still: Tensor | None,
    changing: Tensor,
) -> tuple[Tensor, Tensor]:
    """One block of diffusers' transformer, whose own forward would freeze the batch with ``still``.

    ``still`` is the embedding in place of ``embedded`` for tokens that are not ``changing``, bool
    ``[tokens]``. Both are given to the modulation one after the other, so that deltas see one batch.
    """

    def modulation(layer: Any, time: Tensor) -> list[Tensor]:
        return [part.unsqueeze(1) for part in layer(time).chunk(6, -1)]

    of_image, of_text = modulation(block.img_mod, embedded), modulation(block.txt_mod, embedded)
    if still is not None:
        choice = changing[None, :, None]
        others = modulation(block.img_mod, still)
        of_image = [torch.where(choice, one, other) for one, other in zip(of_image, others)]

    def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = norm(x) * (1 + scale) + shift
        return result

    made_image, made_text = block.attn(
        hidden_states=modulated(block.img_norm1, image, *of_image[:2]),
        encoder_hidden_states=modulated(block.txt_norm1, text, *of_text[:2]),
        encoder_hidden_states_mask=mask,
        image_rotary_emb=rotary,
    )
    image, text = image + of_image[2] * made_image, text + of_text[2] * made_text
    image = image + of_image[5] * block.img_mlp(modulated(block.img_norm2, image, *of_image[3:5]))
    text = text + of_text[5] * block.txt_mlp(modulated(block.txt_norm2, text, *of_text[3:5]))
    return image, text


def rotary_embedding(
    model: QwenImageTransformer2DModel, shapes: Sequence[tuple[int, int]], text_length: int
) -> tuple[Rotary, Rotary]:
    """Of the latents, and of the text: Qwen-Image's "scaled" form, whose rows and columns count from the
    middle of each picture; texts follow on the diagonal, beyond the largest picture."""
    frequencies = [
        1.0 / torch.pow(model.pos_embed.theta, torch.arange(0, size, 2).to(torch.float32) / size)
        for size in model.config.axes_dims_rope
    ]
    angles, furthest = [], []
    for number, (rows, columns) in enumerate(shapes):
        row = (torch.arange(rows) - (rows - rows // 2)).to(torch.float32)
        column = (torch.arange(columns) - (columns - columns // 2)).to(torch.float32)
        down, across = row.unsqueeze(1).expand(-1, columns), column.unsqueeze(0).expand(rows, -1)
        grid = (torch.full_like(down, number), down, across)
        turned = [axis.unsqueeze(-1) * frequency for axis, frequency in zip(grid, frequencies)]
        angles.append(torch.cat(turned, -1).flatten(0, 1))
        furthest += [torch.full((), size // 2, dtype=torch.float32) for size in (rows, columns)]
    place = (torch.arange(text_length).to(torch.float32) + torch.stack(furthest).max()).unsqueeze(-1)
    text = place * torch.cat(frequencies)
    image = torch.cat(angles).unsqueeze(1)
    text = text.unsqueeze(1)
    return (image.cos(), image.sin()), (text.cos(), text.sin())


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """``[B, tokens, heads, head]``, by pairs of neighbours."""
    cos, sin = rotary
    real, imaginary = x.reshape(*x.shape[:3], -1, 2).unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(3)


class JointAttention:
    """diffusers' processor for a block's attention over text and latents, with real numbers alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        attention_mask: None,
        image_rotary_emb: tuple[Rotary, Rotary],
    ) -> tuple[Tensor, Tensor]:
        head = attn.inner_dim // attn.heads

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], -1, head)

        image, text = hidden_states, encoder_hidden_states
        image_rotary, text_rotary = image_rotary_emb
        query = torch.cat(
            [
                _rotate(attn.norm_added_q(heads(attn.add_q_proj(text))), text_rotary),
                _rotate(attn.norm_q(heads(attn.to_q(image))), image_rotary),
            ],
            1,
        )
        key = torch.cat(
            [
                _rotate(attn.norm_added_k(heads(attn.add_k_proj(text))), text_rotary),
                _rotate(attn.norm_k(heads(attn.to_k(image))), image_rotary),
            ],
            1,
        )
        value = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], 1)
        everything = torch.ones(image.shape[:2], dtype=torch.bool)
        mask = torch.cat([encoder_hidden_states_mask, everything], 1).unsqueeze(1).unsqueeze(1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        made = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        made = made.transpose(1, 2).flatten(2)
        length = text.shape[1]  # not split(): ONNX has none for so many free sizes
        return attn.to_out[0](made[:, length:]), attn.to_add_out(made[:, :length])


def _pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens of 2 × 2: ``[B, h/2 · w/2, 4 C]``."""
    channels, height, width = latents.shape[1:]
    x = latents.reshape(-1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, (height // 2) * (width // 2), channels * 4)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[B, height · width, 4 C]`` to ``[B, C, 2 · height, 2 · width]``."""
    channels = tokens.shape[2] // 4
    x = tokens.reshape(-1, height, width, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, channels, height * 2, width * 2)


def make_transformer(config: Mapping[str, Any]) -> QwenImageTransformer2DModel:
    """The transformer of a ``config.json``, without data.

    Raises:
        UnsupportedError: a setting is on that the editing pipelines do not use.
    """
    for setting, what in (
        ("guidance_embeds", "the transformer of diffusers takes no guidance of this kind yet"),
        ("use_additional_t_cond", "the editing pipelines have nothing to give it"),
        ("use_layer3d_rope", "it is for pictures of several layers"),
    ):
        if config.get(setting):
            raise UnsupportedError(
                f"The transformer's config.json sets {setting}, and {what}",
                "Qwen-Image's editors leave it off",
                "Export a pipeline without it",
            )

    def make() -> QwenImageTransformer2DModel:
        model = QwenImageTransformer2DModel.from_config(dict(config))
        for block in model.transformer_blocks:
            block.attn.set_processor(JointAttention())
        return model

    return fake_module(make)


def make_vae(config: Mapping[str, Any]) -> AutoencoderKLQwenImage:
    """The VAE of a ``config.json``, without data, for single frames."""

    def make() -> AutoencoderKLQwenImage:
        vae = AutoencoderKLQwenImage.from_config(dict(config))
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.forward = partial(_convolve_frame, module)
            elif isinstance(module, QwenImageUpsample):
                module.mode = "nearest"  # by a factor of 2 that is "nearest-exact", which ONNX does not have
            elif isinstance(module, QwenImageRMS_norm):
                module.forward = partial(_normalize, module)
        return vae

    return fake_module(make)


def _normalize(module: QwenImageRMS_norm, x: Tensor) -> Tensor:
    """The norm over the channels, in operators that every backend has."""
    length = _length(x, 1).clamp(min=1e-12)
    normal: Tensor = x / length * module.scale * module.gamma + module.bias
    return normal


def _convolve_frame(module: QwenImageCausalConv3d, x: Tensor) -> Tensor:
    """The causal convolution of one frame ``[B, C, 1, h, w]``: what is before it is zero."""
    left, right, top, bottom, _, _ = module._padding
    if (left, top) != (right, bottom):  # the class pads both sides alike
        raise UnsupportedError("A convolution of the VAE pads its sides differently", "Equal padding")
    made = F.conv2d(
        x.squeeze(2),
        module.weight[:, :, -1],
        module.bias,
        module.stride[1:],
        (top, left),
        module.dilation[1:],
    )
    return made.unsqueeze(2)
