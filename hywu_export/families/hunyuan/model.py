"""The whole network under the names of its checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.decoder import Decoder
from hywu_export.families.hunyuan.picture import Aligner, FinalLayer, PatchEmbed, TimestepEmbedder
from hywu_export.families.hunyuan.rotary import Rotary, rotary_tables
from hywu_export.families.hunyuan.vae import VAE
from hywu_export.families.hunyuan.vision import VisionTransformer


class HunyuanImage3(nn.Module):
    """Decoder, embedders, vision transformer and, where the checkpoint has one, the VAE."""

    def __init__(self, config: HunyuanConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.patch_hidden
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.patch_embed = PatchEmbed(config.latent_channels, inner, hidden)
        self.final_layer = FinalLayer(hidden, inner, config.latent_channels)
        self.timestep_emb = TimestepEmbedder(hidden)
        self.time_embed = TimestepEmbedder(hidden)
        self.time_embed_2 = TimestepEmbedder(hidden)
        self.vision_model = VisionTransformer(config.vision)
        self.vision_aligner = Aligner(config.vision.hidden_size, hidden)
        if config.vae is not None:
            self.vae = VAE(config.vae)

    def see(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Patches and their grid to token embeddings ``[B, max_num_patches, hidden]``."""
        out: Tensor = self.vision_aligner(self.vision_model(patches, grid))
        return out

    def embed_latents(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of latents ``[B, C, h, w]`` at a timestep ``[1]``: ``[1, 1, hidden]`` of the timestep, and
        ``[B, h * w, hidden]``."""
        tokens: Tensor = self.patch_embed(latents, self.time_embed(timestep))
        return self.timestep_emb(timestep).unsqueeze(0), tokens

    def velocity(self, tokens: Tensor, timestep: Tensor, height: int, width: int) -> Tensor:
        """The last layer's outputs at picture tokens, to a velocity ``[B, C, h, w]``."""
        out: Tensor = self.final_layer(tokens, self.time_embed_2(timestep), height, width)
        return out

    def rotary(self, positions: Tensor) -> Rotary:
        """Tables of positions ``[batch, length, 2]``."""
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)


def zero_timestep() -> Tensor:
    """The timestep of a reference picture, ``[1]``."""
    return torch.zeros(1)
