"""How much memory the weights of each family's public checkpoint take, from their published configurations.

    python -m tools.family_memory [PIPELINE ...]

Modules are made without data and their parameters counted; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click
import torch

Make = Callable[[], Any]


def _clip(width: int, layers: int, heads: int, projection: int | None = None) -> Make:
    def make() -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=projection or width,
        )
        return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)

    return make


def _t5_xxl() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _gemma2_2b() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config())  # whose defaults are those of the 2B model


def _diffusers(name: str, **config: Any) -> Make:
    def make() -> Any:
        import diffusers

        return getattr(diffusers, name)(**config)

    return make


def _kl(channels: int, quant: bool = True) -> Make:
    return _diffusers(
        "AutoencoderKL",
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


_CROSS = "CrossAttn"
PIPELINES: Mapping[str, tuple[str, Mapping[str, Make]]] = {  # class → public checkpoint, components
    "StableDiffusionInstructPix2PixPipeline": (
        "timbrooks/instruct-pix2pix",
        {
            "unet": _diffusers("UNet2DConditionModel", in_channels=8, cross_attention_dim=768),
            "text_encoder": _clip(768, 12, 12),
            "vae": _kl(4),
        },
    ),
    "StableDiffusionXLInstructPix2PixPipeline": (
        "diffusers/sdxl-instructpix2pix-768",
        {
            "unet": _diffusers(
                "UNet2DConditionModel",
                in_channels=8,
                down_block_types=("DownBlock2D", *[f"{_CROSS}DownBlock2D"] * 2),
                up_block_types=(*[f"{_CROSS}UpBlock2D"] * 2, "UpBlock2D"),
                block_out_channels=(320, 640, 1280),
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                transformer_layers_per_block=(1, 2, 10),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "text_encoder": _clip(768, 12, 12),
            "text_encoder_2": _clip(1280, 32, 20, 1280),
            "vae": _kl(4),
        },
    ),
    "FluxKontextPipeline": (
        "black-forest-labs/FLUX.1-Kontext-dev",
        {
            "transformer": _diffusers("FluxTransformer2DModel", guidance_embeds=True),
            "text_encoder": _clip(768, 12, 12),
            "text_encoder_2": _t5_xxl,
            "vae": _kl(16, quant=False),
        },
    ),
    "QwenImageEditPipeline": (
        "Qwen/Qwen-Image-Edit",
        {
            "transformer": _diffusers("QwenImageTransformer2DModel"),
            "text_encoder": _qwen_vl,
            "vae": _diffusers("AutoencoderKLQwenImage"),
        },
    ),
    "StableDiffusion3Img2ImgPipeline": (
        "stabilityai/stable-diffusion-3-medium-diffusers",
        {
            "transformer": _diffusers(
                "SD3Transformer2DModel",
                num_layers=24,
                num_attention_heads=24,
                attention_head_dim=64,
                caption_projection_dim=1536,
                pos_embed_max_size=192,
                out_channels=16,
            ),
            "text_encoder": _clip(768, 12, 12, 768),
            "text_encoder_2": _clip(1280, 32, 20, 1280),
            "text_encoder_3": _t5_xxl,
            "vae": _kl(16, quant=False),
        },
    ),
    "SanaSprintImg2ImgPipeline": (
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        {
            "transformer": _diffusers(
                "SanaTransformer2DModel",
                sample_size=32,
                guidance_embeds=True,
                qk_norm="rms_norm_across_heads",
                timestep_scale=0.001,
            ),
            "text_encoder": _gemma2_2b,
            "vae": _diffusers(
                "AutoencoderDC",
                latent_channels=32,
                encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
                decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
                encoder_block_types=(*["ResBlock"] * 3, *["EfficientViTBlock"] * 3),
                decoder_block_types=(*["ResBlock"] * 3, *["EfficientViTBlock"] * 3),
                encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
                decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
                encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
                decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
                upsample_block_type="interpolate",
            ),
        },
    ),
}


def parameters(make: Make) -> int:
    """Parameters of the module that ``make`` makes, tied ones once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


@click.command()
@click.argument("pipelines", nargs=-1)
def main(pipelines: tuple[str, ...]) -> None:
    """Prints the parameters of every component, and gigabytes (10^9 bytes) in FP16."""
    for pipeline in pipelines or PIPELINES:
        checkpoint, components = PIPELINES[pipeline]
        total = 0
        click.echo(f"{pipeline}  {checkpoint}")
        for name, make in components.items():
            count = parameters(make)
            total += count
            click.echo(f"  {name:16} {count:15,}  {2 * count / 1e9:6.2f} GB")
        click.echo(f"  {'in all':16} {total:15,}  {2 * total / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()
