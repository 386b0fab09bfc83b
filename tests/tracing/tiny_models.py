"""Small models, each with its graph, its axes and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hywu_export.tracing import Axis, GraphSpec, TensorSpec

AXES = {
    "batch": Axis(1, 16),
    "delta_batch": Axis(1, 16, one_or="batch"),
    "length": Axis(1, 77),
    "height": Axis(32, 512, multiple=16),
    "width": Axis(32, 512, multiple=16),
    "latent_height": Axis(of="height", divide=2),
    "latent_width": Axis(of="width", divide=2),
}
IMAGE = ("batch", "height", "width", 3)
LATENTS = ("batch", 4, "latent_height", "latent_width")


class TextEncoder(nn.Module):
    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(ids).last_hidden_state,)


class ImageEncoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> tuple[Tensor]:
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1.0
        return (self.vae.encode(pixels).latent_dist.mode(),)


class ImageDecoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        pixels = self.vae.decode(latents, return_dict=False)[0]
        return ((pixels * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8),)


class GuidedStep(nn.Module):
    """Three guidance rows per sample, as InstructPix2Pix has them."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, hidden: Tensor, text_scale: Tensor) -> tuple[Tensor]:
        batch = latents.shape[0]
        rows = torch.stack([latents, latents, latents]).reshape(3 * batch, *latents.shape[1:])
        texts = torch.stack([hidden, hidden, torch.zeros_like(hidden)]).reshape(3 * batch, *hidden.shape[1:])
        noise = self.unet(rows, timestep, texts, return_dict=False)[0].reshape(3, batch, *latents.shape[1:])
        return (noise[2] + text_scale[:, None, None, None] * (noise[0] - noise[1]),)


class DeltaLayers(nn.Module):
    """A linear layer and a 1×1 convolution, each with low-rank deltas that broadcast over guidance rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor, gate: Tensor, *deltas: Tensor) -> tuple[Tensor, Tensor]:
        a, b, conv_a, conv_b = deltas
        batch = x.shape[0]
        rows = torch.stack([x, 2 * x, -x])
        gate = gate[:, None, None]
        y = self.linear(rows) + gate * (rows @ a.transpose(1, 2)) @ b.transpose(1, 2)
        y = y.transpose(2, 3)
        flat_a = conv_a.flatten(2)  # a reshape that names the first axis
        z = self.conv(y.reshape(3 * batch, 6, -1)).reshape(3, batch, 4, -1)
        z = z + conv_b @ (gate * (flat_a @ y))
        return y[0], z[1] - z[2]


@dataclass(frozen=True)
class Case:
    """``wrap(component())`` is the module to trace, and ``sizes`` are sizes of its axes to compare at."""

    component: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[Mapping[str, int], ...]

    def spec(self, name: str, component: nn.Module) -> GraphSpec:
        return GraphSpec(name, self.wrap(component).eval(), self.inputs, self.outputs)

    def tensors(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(sum(sizes.values()))
        made = []
        for spec in self.inputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            if spec.dtype == "float32":
                made.append(torch.randn(shape, generator=generator))
            else:
                made.append(
                    torch.randint(0, 90, shape, generator=generator, dtype=getattr(torch, spec.dtype))
                )
        return tuple(made)


def _clip() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=99,
        bos_token_id=98,
    )
    return CLIPTextModel(config)


def _vae() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        latent_channels=4,
    )


def _unet() -> nn.Module:
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _areas(*areas: tuple[int, int, int]) -> tuple[dict[str, int], ...]:
    return tuple(
        {
            "batch": b,
            "height": h,
            "width": w,
            "latent_height": h // 2,
            "latent_width": w // 2,
            "length": 7 * b,
        }
        for b, h, w in areas
    )


CASES = {
    "text_encoder": Case(
        _clip,
        TextEncoder,
        (TensorSpec("input_ids", "int64", ("batch", "length")),),
        (TensorSpec("hidden", "float32", ("batch", "length", 32)),),
        tuple({"batch": b, "length": n} for b, n in ((1, 1), (3, 77), (5, 12))),
    ),
    "image_encoder": Case(
        _vae,
        ImageEncoder,
        (TensorSpec("image", "uint8", IMAGE),),
        (TensorSpec("latents", "float32", LATENTS),),
        _areas((1, 32, 48), (3, 64, 32)),
    ),
    "image_decoder": Case(
        _vae,
        ImageDecoder,
        (TensorSpec("latents", "float32", LATENTS),),
        (TensorSpec("image", "uint8", IMAGE),),
        _areas((1, 32, 48), (3, 64, 32)),
    ),
    "step": Case(
        _unet,
        GuidedStep,
        (
            TensorSpec("latents", "float32", LATENTS),
            TensorSpec("timestep", "float32", ()),
            TensorSpec("hidden", "float32", ("batch", "length", 32)),
            TensorSpec("guidance.text", "float32", ("batch",)),
        ),
        (TensorSpec("latents.next", "float32", LATENTS),),
        _areas((1, 32, 32), (2, 48, 32), (5, 32, 64)),
    ),
    "deltas": Case(
        DeltaLayers,
        lambda module: module,
        (
            TensorSpec("x", "float32", ("batch", "length", 8)),
            TensorSpec("gate", "float32", ("batch",)),
            TensorSpec("linear.lora_A", "float32", ("delta_batch", 2, 8)),
            TensorSpec("linear.lora_B", "float32", ("delta_batch", 6, 2)),
            TensorSpec("conv.lora_A", "float32", ("delta_batch", 2, 6, 1, 1)),
            TensorSpec("conv.lora_B", "float32", ("delta_batch", 4, 2)),
        ),
        (
            TensorSpec("y", "float32", ("batch", 6, "length")),
            TensorSpec("z", "float32", ("batch", 4, "length")),
        ),
        tuple({"batch": b, "delta_batch": d, "length": n} for b, d, n in ((1, 1, 1), (3, 1, 4), (3, 3, 9))),
    ),
}
