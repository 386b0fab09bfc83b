"""What an edit is made of, as modules to trace. All of them use one `HunyuanImage3` as ``transformer``."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.hunyuan.decoder import KeyValue
from hywu_export.families.hunyuan.model import HunyuanImage3, zero_timestep
from hywu_export.families.hunyuan.rotary import divide, grid_positions, text_positions
from hywu_export.families.hunyuan.sequence import Tokens, ratio_token
from hywu_export.families.hunyuan.vision import grid_cells
from hywu_export.families.pixels import from_pixels, to_pixels
from hywu_export.schedules import apply_row

DECODING = ("model", "patch_embed", "final_layer", "timestep_emb", "time_embed", "time_embed_2")


def part(network: HunyuanImage3, *names: str) -> HunyuanImage3:
    """The network with these of its modules: a graph is traced with what it has, read or not, at a price
    for each parameter."""
    some = copy(network)
    some._modules = {name: network._modules[name] for name in names}
    return some


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to latents ``[B, C, h, w]``."""

    def __init__(self, transformer: HunyuanImage3):
        super().__init__()
        self.transformer = part(transformer, "vae")

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.transformer.vae.encode(from_pixels(image)),)


class ImageDecoder(nn.Module):
    """Latents ``[B, C, h, w]`` to pixels ``uint8 [B, H, W, 3]``."""

    def __init__(self, transformer: HunyuanImage3):
        super().__init__()
        self.transformer = part(transformer, "vae")

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (to_pixels(self.transformer.vae.decode(latents)),)


class Vision(nn.Module):
    """Patches ``[B, count, features]`` and their grid ``[2]`` to ViT tokens ``[B, count, hidden]``."""

    def __init__(self, transformer: HunyuanImage3):
        super().__init__()
        self.transformer = part(transformer, "vision_model", "vision_aligner")

    def forward(self, patches: Tensor, grid: Tensor) -> tuple[Tensor]:
        return (self.transformer.see(patches, grid),)


class Prepare(nn.Module):
    """Standard normal noise to the first latents, and the ``<img_ratio>`` token of their size."""

    def __init__(self, tokens: Tokens, base_size: int):
        super().__init__()
        self.tokens, self.base_size = tokens, base_size

    def forward(self, noise: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return noise * scale, ratio_token(self.tokens, self.base_size, noise.shape[2], noise.shape[3])


class Prompt:
    """The sequence before the picture that is made: embeddings, positions, mask, and the way back.

    `split` gives the photo's tokens and the others apart, because only the number of the former changes with
    the picture's size, and a tensor between graphs has no axis that is a sum.
    """

    def __init__(self, transformer: HunyuanImage3, tokens: Tokens):
        self.transformer = transformer
        self.tokens = tokens
        self.before = len(tokens.prefix) + 4  # <boi> <img_size> <img_ratio> <timestep>

    def __call__(
        self, suffixes: Sequence[Tensor], latents: Tensor, vit: Tensor, grid: Tensor
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the decoder; the last layer's output ``[rows * B, n, hidden]``, and the keys and values.

        Args:
            suffixes: ids of the suffix ``[B, s]``, for each guidance row.
            latents, vit: of the photo, ``[B, C, h, w]`` and ``[B, count, hidden]``.
            grid: of the ViT tokens, int64 ``[2]``.
        """
        length = suffixes[0].shape[1]
        rotary = self.transformer.rotary(self._positions(latents, grid, length))
        mask = self._mask(latents, vit.shape[1], length)
        made: tuple[Tensor, list[KeyValue]] = self.transformer.model(
            self._embed(suffixes, latents, vit), rotary, mask
        )
        return made

    def _embed(self, suffixes: Sequence[Tensor], latents: Tensor, vit: Tensor) -> Tensor:
        tokens, wte = self.tokens, self.transformer.model.wte
        height, width = latents.shape[2:]
        ratio = ratio_token(tokens, self.transformer.config.base_size, height, width)
        opening = torch.cat([torch.tensor([*tokens.prefix, tokens.boi, tokens.size]), ratio])
        time, photo = self.transformer.embed_latents(latents, zero_timestep())
        suffix = wte(torch.cat(list(suffixes)))
        rows = len(suffixes)

        def everywhere(x: Tensor) -> Tensor:
            return x.expand(suffix.shape[0], -1, -1)

        return torch.cat(
            [
                everywhere(wte(opening).unsqueeze(0)),
                everywhere(time),
                torch.cat([photo] * rows),
                everywhere(wte(torch.tensor([[tokens.separator]]))),
                torch.cat([vit] * rows),
                everywhere(wte(torch.tensor([[tokens.eoi]]))),
                suffix,
            ],
            dim=1,
        )

    def _positions(self, latents: Tensor, grid: Tensor, suffix: int) -> Tensor:
        height, width = latents.shape[2:]
        area, count = height * width, self.transformer.config.vision.max_num_patches
        start, bridge = self.before, self.before + area
        picture = torch.arange(area)
        row = divide(picture, width)
        high, wide = (torch.arange(side)[-1:] + 1 for side in (height, width))
        photo = grid_positions(torch.tensor([start]), high, wide, row, picture - row * width)
        vit = text_positions(torch.arange(count) + (bridge + 1))
        row, column, within = grid_cells(grid, count)
        first = torch.arange(bridge + 1)[-1:] + 1
        seen = grid_positions(first, grid[:1], grid[1:], row, column)
        vit = torch.where(within.unsqueeze(-1), seen, vit)
        parts = [
            text_positions(torch.arange(start)),
            photo,
            text_positions(torch.arange(bridge + 1)[-1:]),
            vit,
            text_positions(torch.arange(suffix + 1) + (bridge + 1 + count)),
        ]
        return torch.cat(parts).unsqueeze(0)

    def _mask(self, latents: Tensor, vit: int, suffix: int) -> Tensor:
        """``[1, 1, n, n]``: causal, and everything within the photo's tokens."""
        area = latents.shape[2] * latents.shape[3]
        place = torch.arange(self.before + area + vit + suffix + 2)
        causal = place.unsqueeze(0) <= place.unsqueeze(1)
        first, end = self.before, self.before + area
        slices = [(first, end), (end + 1, end + 1 + vit)]
        if self.transformer.config.joint_attention:
            slices = [(first, end + 1 + vit)]
        for low, high in slices:
            inside = (place >= low) & (place < high)
            causal = causal | (inside.unsqueeze(0) & inside.unsqueeze(1))
        return causal[None, None]

    def split(self, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[batch, …, n, d]`` to what is before the photo, the photo as ``[batch, …, h, w, d]``, the
        rest."""
        height, width = latents.shape[2:]
        end = self.before + height * width
        photo = x[..., self.before : end, :].unflatten(-2, (height, width))  # type: ignore[no-untyped-call]
        return x[..., : self.before, :], photo, x[..., end:, :]

    def after(self, suffix: int) -> int:
        """Tokens behind those of the photo, for a suffix of this length."""
        return suffix + self.transformer.config.vision.max_num_patches + 2


class Condition(nn.Module):
    """The last layer's output, before the final norm and without deltas, for the parameter generator."""

    def __init__(self, transformer: HunyuanImage3, tokens: Tokens):
        super().__init__()
        transformer = part(transformer, *DECODING)
        self.transformer = transformer
        self.prompt = Prompt(transformer, tokens)

    def forward(
        self, ids: Tensor, latents: Tensor, vit: Tensor, grid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _ = self.prompt([ids], latents, vit, grid)
        return self.prompt.split(hidden, latents)


class JoinCondition(nn.Module):
    """What `Condition` gave, and the mask of the suffix, to one condition ``[B, n, hidden]`` and its mask."""

    def forward(self, before: Tensor, photo: Tensor, after: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        condition = torch.cat([before, photo.flatten(1, 2), after], dim=1)
        padding = torch.full_like(condition[:, : -mask.shape[1], 0], 1.0)
        return condition, torch.cat([padding, mask.to(condition.dtype)], dim=1) > 0.5


class Prefill(nn.Module):
    """The prompt with deltas: keys and values of every layer, for all steps.

    Inputs in the order of `HunyuanImage3Instruct.plan`, then the deltas of `cached_targets`. Outputs are,
    layer by layer, keys of the text ``[rows, B, kv_heads, n, d]`` and of the photo ``[rows, B, kv_heads, h,
    w, d]``, and values alike.
    """

    def __init__(self, transformer: HunyuanImage3, tokens: Tokens, spec: DeltaSpec, guided: bool):
        super().__init__()
        transformer = part(transformer, *DECODING)
        self.transformer = transformer
        self.prompt = Prompt(transformer, tokens)
        spec = cached_targets(spec, transformer.config.num_layers)
        self.names = tuple(spec.tensors())
        self.injection = inject(transformer, spec)
        self.rows = 2 if guided else 1

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, vit, grid, mask, ratio, gate, *rows = inputs[:cut]
        suffixes = [_with_ratio(ids, mask, ratio) for ids in rows]
        with self.injection as injection:
            injection.set(deltas, gate, rows=self.rows)
            _, made = self.prompt(suffixes, latents, vit, grid)
        outputs: list[Tensor] = []
        for pair in made:
            for x in pair:
                rows_apart = x.unflatten(0, (self.rows, -1))  # type: ignore[no-untyped-call]
                before, photo, after = self.prompt.split(rows_apart, latents)
                outputs += [torch.cat([before, after], dim=-2), photo]
        return tuple(outputs)


def cached_targets(spec: DeltaSpec, layers: int) -> DeltaSpec:
    """The targets that keys and values depend on: nothing reads what the last layer makes of them."""
    last = f"model.layers.{layers - 1}."
    return DeltaSpec(
        tuple(
            target
            for target in spec.targets
            if not target.module.startswith(last) or target.module == f"{last}self_attn.qkv_proj"
        )
    )


def _with_ratio(ids: Tensor, mask: Tensor, ratio: Tensor) -> Tensor:
    """A suffix ``[B, s]`` with ``ratio`` ``[1]`` behind its last token: ``[B, s + 1]``."""
    place = torch.arange(ids.shape[1] + 1)
    longer = torch.nn.functional.pad(ids, (0, 1))
    return torch.where(place == mask.sum(1, keepdim=True), ratio, longer)


class Step(nn.Module):
    """The timestep's token and the picture's through the decoder, guidance, and the sampler's update.

    Inputs in the order of `HunyuanImage3Instruct.plan`, then the cache as `Prefill` gives it, then the
    deltas.
    """

    def __init__(self, transformer: HunyuanImage3, tokens: Tokens, spec: DeltaSpec, guided: bool):
        super().__init__()
        transformer = part(transformer, *DECODING)
        self.transformer = transformer
        self.before = Prompt(transformer, tokens).before
        self.names = tuple(spec.tensors())
        self.injection = inject(transformer, spec)
        self.guided = guided

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        start = cut - 4 * self.transformer.config.num_layers
        cache = [x.flatten(0, 1) for x in inputs[start:cut]]
        latents, history, noise, timestep, coefficients, gate, mask, *guidance = inputs[:start]
        with self.injection as injection:
            injection.set(deltas, gate, rows=2 if self.guided else 1)
            velocity = self._predict(latents * coefficients[0], timestep.reshape(1), mask, cache)
        if self.guided:
            # Not chunk(2): it would freeze the batch.
            rows = velocity.unflatten(0, (2, -1))  # type: ignore[no-untyped-call]
            conditional, unconditional = rows.unbind(0)
            scale = guidance[0][:, None, None, None]
            velocity = unconditional + scale * (conditional - unconditional)
        return apply_row(coefficients, latents, velocity, noise, history)

    def _predict(self, x: Tensor, timestep: Tensor, mask: Tensor, cache: list[Tensor]) -> Tensor:
        rows = 2 if self.guided else 1
        height, width = x.shape[2:]
        time, tokens = self.transformer.embed_latents(x, timestep)
        hidden = torch.cat([time.expand(x.shape[0], -1, -1), tokens], dim=1)
        past = [
            (torch.cat([cache[i + 1].flatten(2, 3), cache[i]], 2),
             torch.cat([cache[i + 3].flatten(2, 3), cache[i + 2]], 2))
            for i in range(0, len(cache), 4)
        ]  # fmt: skip
        photo = cache[1].shape[2] * cache[1].shape[3]
        positions, allowed = self._places(mask, photo, cache[0].shape[2], height, width)
        rotary = self.transformer.rotary(torch.cat([positions] * rows))
        output, _ = self.transformer.model(
            torch.cat([hidden] * rows), rotary, torch.cat([allowed] * rows), past
        )
        return self.transformer.velocity(output[:, 1:], timestep, height, width)

    def _places(self, mask: Tensor, photo: int, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions ``[B, 1 + h * w, 2]`` of the step's tokens, and what they may attend to, keys being the
        photo, the text with padding at its end, and the step's own tokens."""
        suffix = mask.shape[1] + 1
        fixed = text - suffix
        # The suffix's tokens that count, and the <img_ratio> behind them.
        count = mask.sum(1, keepdim=True) + 1
        index = torch.arange(height * width)
        row = divide(index, width)
        high, wide = (torch.arange(side)[-1:] + 1 for side in (height, width))
        # All sizes as values: the place of the timestep's token.
        place = count + torch.arange(photo + fixed)[-1:] + 1
        picture = grid_positions(place + 1, high, wide, row, index - row * width)
        positions = torch.cat([text_positions(place), picture], dim=1)

        valid = torch.arange(text) < count + fixed
        seen = torch.cat([torch.full((1, photo), True).expand(mask.shape[0], -1), valid], dim=1)
        own = torch.arange(1 + height * width)
        among = (own.unsqueeze(0) == 0) | (own.unsqueeze(1) > 0)
        queries = own.shape[0]
        allowed = torch.cat(
            [seen.unsqueeze(1).expand(-1, queries, -1), among.unsqueeze(0).expand(mask.shape[0], -1, -1)], 2
        )
        return positions, allowed.unsqueeze(1)
