"""LoRA files in every spelling, against diffusers' own conversion of the same file."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hywu_export.deltas.catalogue import Catalogue, Resolved
from hywu_export.deltas.convert import resolve
from hywu_export.deltas.spellings import spellings
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError

RANK = 4


def layers(module: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def factors(layer: nn.Module, rank: int, seed: int, rows: int = 0) -> tuple[Tensor, Tensor]:
    """Random A and B for a layer, B with ``rows`` rows if given."""
    generator = torch.Generator().manual_seed(seed)
    out, *inputs = layer.weight.shape
    ones = (1, 1) if isinstance(layer, nn.Conv2d) else ()
    a = torch.randn(rank, *inputs, generator=generator)
    return a, torch.randn(rows or out, rank, *ones, generator=generator)


def kohya(
    names: Mapping[str, tuple[nn.Module, int]], rank: int = RANK, alphas: Sequence[float] = (2.0, 4.0, 6.0)
) -> dict[str, Tensor]:
    """A file as kohya's scripts write it: name → layer whose input it has, and rows of B (0: the layer's)."""
    tensors = {}
    for i, (name, (layer, rows)) in enumerate(names.items()):
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors(layer, rank, i, rows)
        tensors[f"{name}.alpha"] = torch.tensor(alphas[i % len(alphas)])
    return tensors


def saved(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    file = path / "lora.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata or None)
    return file


def resolved(file: Path, module: nn.Module, denoiser: str = "transformer", **others: nn.Module) -> Resolved:
    return resolve(file, Catalogue.from_modules({denoiser: module, **others}, denoiser))


def changes(found: Resolved) -> dict[str, np.ndarray]:
    """B · A of every module, [out, in·kh·kw]."""
    return {name: pair.b @ pair.a.reshape(pair.rank, -1) for name, pair in found.pairs.items()}


def converted(tensors: Mapping[str, Tensor], prefix: str = "transformer.") -> dict[str, np.ndarray]:
    """B · A of every module in a state dict that diffusers has converted to its own names."""
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight") and key.startswith(prefix):
            b = tensors[key.replace("lora_A", "lora_B")]
            found[key.removeprefix(prefix).removesuffix(".lora_A.weight")] = (b @ a).numpy()
    return found


def assert_same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    assert expected
    for name, change in expected.items():
        np.testing.assert_allclose(got[name], change, rtol=1e-4, atol=1e-5, err_msg=name)


# --- UNets: names of modules here, with underscores, and those of latent diffusion ---


def make_unet(**settings: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(defaults | settings))


@pytest.fixture(scope="module")
def sdxl() -> nn.Module:
    return make_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=20,
    )


def in_diffusers(unet: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """What diffusers' loader makes of a file: the change that every layer adds to its weight."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from peft.tuners.lora import LoraLayer

    unet = copy.deepcopy(unet)
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="x")
    return {
        path: layer.get_delta_weight("x").detach().flatten(1).numpy()
        for path, layer in unet.named_modules()
        if isinstance(layer, LoraLayer)
    }


# Where a module of an SDXL UNet with three levels of two layers stands in Stability's code (as in the file of
# any SDXL LoRA of kohya's scripts).
SDXL_NAMES = {
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_7_1_transformer_blocks_0_attn2_to_out_0": (
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_1_transformer_blocks_0_ff_net_2": (
        "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
}
SDXL_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


def test_kohya_sdxl_with_ldm_names(sdxl: nn.Module, tmp_path: Path) -> None:
    modules = layers(sdxl)
    names = SDXL_NAMES | SDXL_TOP
    # diffusers gives attention one alpha, the most frequent, where a file has several.
    tensors = kohya({f"lora_unet_{there}": (modules[here], 0) for there, here in names.items()}, alphas=[2.0])
    found = resolved(saved(tmp_path, tensors), sdxl, "unet")
    assert found.spelling == "kohya, LDM names"
    assert set(found.pairs) == set(names.values())
    assert_same(changes(found), in_diffusers(sdxl, tensors))


def test_every_layer_of_a_unet_has_an_ldm_name(sdxl: nn.Module) -> None:
    for unet in (sdxl, make_unet()):
        catalogue = Catalogue.from_modules({"unet": unet}, "unet")
        (ldm,) = (s for s in spellings(catalogue.components["unet"]) if s.name == "LDM")
        assert {pieces[0].path for pieces in ldm.meanings.values()} == set(layers(unet))


def test_kohya_sd_with_diffusers_names(tmp_path: Path) -> None:
    """Written by diffusers' converter, from what PEFT saves: convolutions, and text encoders."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict

    unet = make_unet()
    unet.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            init_lora_weights=False,
            target_modules=["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "downsamplers.0.conv"],
        )
    )
    state = get_peft_model_state_dict(unet)
    tensors = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in state.items()})
    assert any(key.startswith("lora_unet_down_blocks_1_attentions_0_") for key in tensors)
    found = resolved(saved(tmp_path, tensors), make_unet(), "unet")
    assert found.spelling == "kohya"
    assert_same(changes(found), in_diffusers(make_unet(), tensors))


def test_diffusers_before_peft(tmp_path: Path) -> None:
    """``attn1.processor.to_q_lora.down``, the first form that diffusers had."""
    unet = make_unet()
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    tensors = {}
    for i, part in enumerate(("to_q", "to_k", "to_v", "to_out")):
        a, b = factors(unet.get_submodule(f"{block}.{part}" + (".0" if part == "to_out" else "")), RANK, i)
        tensors |= {
            f"unet.{block}.processor.{part}_lora.down.weight": a,
            f"unet.{block}.processor.{part}_lora.up.weight": b,
        }
    found = resolved(saved(tmp_path, tensors), unet, "unet")
    assert found.spelling == "diffusers before PEFT"
    assert_same(changes(found), in_diffusers(make_unet(), tensors))


def test_locon_with_a_middle(tmp_path: Path) -> None:
    """CP-decomposed LoCon is three convolutions, one after the other."""
    unet = make_unet()
    layer = unet.conv_in
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (
        torch.randn(*shape, generator=generator) for shape in ((3, 4, 1, 1), (5, 3, 3, 3), (8, 5, 1, 1))
    )
    tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_mid.weight": mid}
    tensors |= {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.alpha": torch.tensor(10.0)}
    pair = resolved(saved(tmp_path, tensors), unet, "unet").pairs["conv_in"]
    x = torch.randn(2, 4, 7, 6)
    conv = torch.nn.functional.conv2d
    expected = 2 * conv(conv(conv(x, down), mid, padding=layer.padding), up)
    a, b = torch.from_numpy(pair.a), torch.from_numpy(pair.b)
    torch.testing.assert_close(
        conv(conv(x, a, padding=1), b[:, :, None, None]), expected, atol=1e-4, rtol=1e-4
    )


def test_a_pointwise_convolution_is_a_linear_layer(sdxl: nn.Module, tmp_path: Path) -> None:
    """SD 1 has convolutions where SDXL has linear layers; a LoRA of either form fits both."""
    name = "down_blocks.1.attentions.0.proj_in"
    flat = f"lora_unet_{name.replace('.', '_')}"
    for source, target in ((make_unet(), sdxl), (sdxl, make_unet())):
        tensors = kohya({flat: (source.get_submodule(name), 0)})
        pair = resolved(saved(tmp_path, tensors), target, "unet").pairs[name]
        assert pair.a.ndim == target.get_submodule(name).weight.ndim


# --- Transformers: BFL's, xlabs', OneTrainer's names for Flux, and others ---


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    """Of full width, which diffusers' converters have as numbers in them, without data."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


def flux_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders import FluxLoraLoaderMixin

    state: dict[str, Tensor] = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    return state


def flux_names(flux: nn.Module, double: str, single: str) -> dict[str, tuple[nn.Module, int]]:
    """Some of BFL's layers by name: the layer whose input each has, and its rows."""
    blocks = flux.transformer_blocks[1], flux.single_transformer_blocks[1]
    return {
        f"{double}img_attn_qkv": (blocks[0].attn.to_q, 3 * 3072),
        f"{double}txt_attn_qkv": (blocks[0].attn.add_q_proj, 3 * 3072),
        f"{double}img_attn_proj": (blocks[0].attn.to_out[0], 0),
        f"{double}txt_attn_proj": (blocks[0].attn.to_add_out, 0),
        f"{double}img_mlp_0": (blocks[0].ff.net[0].proj, 0),
        f"{double}img_mlp_2": (blocks[0].ff.net[2], 0),
        f"{double}txt_mlp_0": (blocks[0].ff_context.net[0].proj, 0),
        f"{double}txt_mlp_2": (blocks[0].ff_context.net[2], 0),
        f"{double}img_mod_lin": (blocks[0].norm1.linear, 0),
        f"{double}txt_mod_lin": (blocks[0].norm1_context.linear, 0),
        f"{single}linear1": (blocks[1].attn.to_q, 3 * 3072 + 12288),
        f"{single}linear2": (blocks[1].proj_out, 0),
        f"{single}modulation_lin": (blocks[1].norm.linear, 0),
    }


def test_kohya_flux(flux: nn.Module, tmp_path: Path) -> None:
    tensors = kohya(flux_names(flux, "lora_unet_double_blocks_1_", "lora_unet_single_blocks_1_"))
    found = resolved(saved(tmp_path, tensors), flux)
    assert found.spelling == "kohya, BFL names"
    assert len(found.pairs) == 20
    assert_same(changes(found), converted(flux_state(tensors)))


def test_kohya_flux_with_slices_trained_apart(flux: nn.Module, tmp_path: Path) -> None:
    """sd-scripts' ``split_qkv``: B is zero outside of blocks; every layer gets the ranks of its own block."""
    name = "lora_unet_single_blocks_0_linear1"
    tensors = kohya({name: (flux.single_transformer_blocks[0].attn.to_q, 3 * 3072 + 12288)}, rank=8)
    up = tensors[f"{name}.lora_up.weight"]
    sizes = [3072, 3072, 3072, 12288]
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    up *= rows[:, None] == torch.arange(8)[None] // 2
    found = resolved(saved(tmp_path, tensors), flux)
    assert {pair.rank for pair in found.pairs.values()} == {2}
    assert_same(changes(found), converted(flux_state(tensors)))


def test_one_trainer_flux(flux: nn.Module, tmp_path: Path) -> None:
    modules = layers(flux)
    prefix, block = "lora_transformer_", "single_transformer_blocks_0_attn_"
    names = {f"{prefix}{block}to_{part}": f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"}
    names |= {
        f"{prefix}transformer_blocks_1_attn_{part.replace('.', '_')}": f"transformer_blocks.1.attn.{part}"
        for part in ("to_out.0", "to_add_out", "add_k_proj")
    }
    names |= {f"{prefix}x_embedder": "x_embedder"}
    names |= {f"{prefix}time_text_embed_text_embedder_linear_1": "time_text_embed.text_embedder.linear_1"}
    tensors = kohya({there: (modules[here], 0) for there, here in names.items()})
    found = resolved(saved(tmp_path, tensors), flux)
    assert found.spelling == "OneTrainer"
    assert_same(changes(found), converted(flux_state(tensors)))


def test_xlabs(flux: nn.Module, tmp_path: Path) -> None:
    double, single = flux.transformer_blocks[0], flux.single_transformer_blocks[0]
    tensors = {}
    for i, (name, layer, rows) in enumerate(
        (
            ("double_blocks.0.processor.qkv_lora1", double.attn.to_q, 3 * 3072),
            ("double_blocks.0.processor.qkv_lora2", double.attn.add_q_proj, 3 * 3072),
            ("double_blocks.0.processor.proj_lora1", double.attn.to_out[0], 0),
            ("double_blocks.0.processor.proj_lora2", double.attn.to_add_out, 0),
            ("single_blocks.0.processor.qkv_lora", single.attn.to_q, 3 * 3072),
            ("single_blocks.0.processor.proj_lora", single.proj_out, 0),
        )
    ):
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = factors(layer, RANK, i, rows)
    found = resolved(saved(tmp_path, tensors), flux)
    assert found.spelling == "xlabs"
    assert_same(changes(found), converted(flux_state(tensors)))


def test_diffusers_names_with_alphas(flux: nn.Module, tmp_path: Path) -> None:
    """``transformer.<path>.lora_A.weight`` beside ``transformer.<path>.alpha``: alpha / rank is the scale."""
    name = "transformer_blocks.0.attn.to_q"
    a, b = factors(flux.get_submodule(name), RANK, 0)
    tensors = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    plain = changes(resolved(saved(tmp_path, tensors), flux))
    np.testing.assert_allclose(plain[name], (b @ a).numpy(), rtol=1e-5)
    tensors[f"transformer.{name}.alpha"] = torch.tensor(1.0)
    np.testing.assert_allclose(
        changes(resolved(saved(tmp_path, tensors), flux))[name], plain[name] / RANK, rtol=1e-5
    )


@pytest.mark.parametrize("spelled", ["kohya", "dotted", "default"])
def test_qwen(spelled: str, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel
    from diffusers.loaders import QwenImageLoraLoaderMixin

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=8
        )
    modules = {
        path: layer
        for path, layer in layers(model).items()
        if path.startswith("transformer_blocks.1.") or spelled == "kohya"
    }
    if spelled == "kohya":
        flat = {f"lora_unet_{path.replace('.', '_')}": (layer, 0) for path, layer in modules.items()}
        tensors = kohya(flat)
    else:
        tensors = {}
        prefix, adapter = ("diffusion_model.", "") if spelled == "dotted" else ("", "default.")
        for i, (path, layer) in enumerate(modules.items()):
            a, b = factors(layer, RANK, i)
            tensors[f"{prefix}{path}.lora_A.{adapter}weight"] = a
            tensors[f"{prefix}{path}.lora_B.{adapter}weight"] = b
            tensors[f"{prefix}{path}.alpha"] = torch.tensor(2.0)
    found = resolved(saved(tmp_path, tensors), model)
    assert set(found.pairs) == set(modules)
    state = QwenImageLoraLoaderMixin.lora_state_dict(dict(tensors))
    assert_same(changes(found), converted(state))


# --- Names of the original checkpoints, against diffusers' converters of whole checkpoints: a B has the rows
# --- of the weight, so it goes through them as a weight does ---


class _Original:
    """Rows of the original checkpoint's layers, learnt from what a converter asks for."""

    def __init__(self, rows: Mapping[str, int], others: Mapping[str, Tensor]):
        self.rows, self.others = rows, others

    def checkpoint(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {
            f"{name}.weight": torch.randn(rows, RANK, generator=generator) for name, rows in self.rows.items()
        }
        biases = {f"{name}.bias": torch.zeros(rows) for name, rows in self.rows.items()}
        return {**made, **biases, **self.others}


def sd3() -> tuple[nn.Module, _Original, Callable[..., Any]]:
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8,
            dual_attention_layers=(0,),
        )  # fmt: skip
    d = 16
    rows = {"x_embedder.proj": d, "t_embedder.mlp.0": d, "t_embedder.mlp.2": d, "context_embedder": d}
    rows |= {"y_embedder.mlp.0": d, "y_embedder.mlp.2": d, "final_layer.linear": 64}
    rows["final_layer.adaLN_modulation.1"] = 2 * d
    for i in range(2):
        x, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        rows |= {f"{x}.attn.qkv": 3 * d, f"{x}.attn.proj": d, f"{x}.mlp.fc1": 4 * d, f"{x}.mlp.fc2": d}
        rows |= {f"{x}.adaLN_modulation.1": 9 * d if i == 0 else 6 * d, f"{context}.attn.qkv": 3 * d}
        rows[f"{context}.adaLN_modulation.1"] = 6 * d if i == 0 else 2 * d
        if i == 0:
            rows |= {f"{x}.attn2.qkv": 3 * d, f"{x}.attn2.proj": d, f"{context}.attn.proj": d}
            rows |= {f"{context}.mlp.fc1": 4 * d, f"{context}.mlp.fc2": d}
    return (
        model,
        _Original(rows, {"pos_embed": torch.zeros(1)}),
        convert_sd3_transformer_checkpoint_to_diffusers,
    )


def sana() -> tuple[nn.Module, _Original, Callable[..., Any]]:
    from diffusers import SanaTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

    with torch.device("meta"):
        model = SanaTransformer2DModel(
            num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        )  # fmt: skip
    d = 16
    rows = {"x_embedder.proj": d, "t_embedder.mlp.0": d, "t_embedder.mlp.2": d, "t_block.1": 6 * d}
    rows |= {"y_embedder.y_proj.fc1": d, "y_embedder.y_proj.fc2": d, "final_layer.linear": 32}
    rows |= {"blocks.0.attn.qkv": 3 * d, "blocks.0.attn.proj": d, "blocks.0.cross_attn.q_linear": d}
    rows |= {"blocks.0.cross_attn.kv_linear": 2 * d, "blocks.0.cross_attn.proj": d}
    rows |= {"blocks.0.mlp.inverted_conv.conv": 80, "blocks.0.mlp.point_conv.conv": d}
    depth = {f"blocks.0.mlp.depth_conv.conv.{part}": torch.zeros(80, RANK) for part in ("weight", "bias")}
    names = ("pos_embed", "y_embedder.y_embedding", "attention_y_norm.weight", "blocks.0.scale_shift_table")
    others = {name: torch.zeros(1) for name in (*names, "final_layer.scale_shift_table")}
    return model, _Original(rows, {**depth, **others}), convert_sana_transformer_to_diffusers


def flux_original() -> tuple[nn.Module, _Original, Callable[..., Any]]:
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    d = 3072
    rows = {"img_in": d, "txt_in": d, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * d}
    rows |= {
        f"{part}_in.{side}_layer": d for part in ("time", "vector", "guidance") for side in ("in", "out")
    }
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}_"
        rows |= {f"{block}attn.qkv": 3 * d, f"{block}attn.proj": d, f"{block}mod.lin": 6 * d}
        rows |= {f"{block}mlp.0": 4 * d, f"{block}mlp.2": d}
    rows |= {"single_blocks.0.linear1": 7 * d, "single_blocks.0.linear2": d}
    rows["single_blocks.0.modulation.lin"] = 3 * d
    norms = [
        f"double_blocks.0.{s}_attn.norm.{n}_norm.scale" for s in ("img", "txt") for n in ("query", "key")
    ]
    norms += [f"single_blocks.0.norm.{n}_norm.scale" for n in ("query", "key")]
    return (
        model,
        _Original(rows, {n: torch.zeros(1) for n in norms}),
        convert_flux_transformer_checkpoint_to_diffusers,
    )


@pytest.mark.parametrize("spelled", ["kohya", "ComfyUI", "PEFT"])
@pytest.mark.parametrize("make", [sd3, sana, flux_original])
def test_names_of_original_checkpoints(
    make: Callable[[], tuple[nn.Module, _Original, Callable[..., Any]]], spelled: str, tmp_path: Path
) -> None:
    if spelled == "PEFT" and make is not flux_original:
        pytest.skip("Flux trainers alone leave out the configuration")
    model, original, convert = make()
    modules = layers(model)
    checkpoint = original.checkpoint()
    expected = {
        key.removesuffix(".weight"): value
        for key, value in convert(dict(checkpoint)).items()
        if key.removesuffix(".weight") in modules and key.endswith(".weight") and value.shape[-1] == RANK
    }
    expected.pop("transformer_blocks.0.ff.conv_depth", None)  # has groups, and takes no deltas
    width = {path: layer.weight.shape[1:] for path, layer in modules.items()}
    named = spellings(Catalogue.from_modules({"transformer": model}, "transformer").components["transformer"])
    meanings = {
        name: pieces for spelling in named if spelling.name for name, pieces in spelling.meanings.items()
    }
    tensors = {}
    for name in original.rows:
        a = torch.randn(RANK, *width[meanings[name][0].path])
        b = checkpoint[f"{name}.weight"]
        b = b[:, :, None, None] if a.ndim == 4 else b
        if spelled == "kohya":
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        else:
            prefix = "diffusion_model." if spelled == "ComfyUI" else "base_model.model."
            tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    found = resolved(saved(tmp_path, tensors), model)
    assert found.spelling.startswith(f"{spelled}, ")
    assert found.pairs.keys() == expected.keys()
    for name, b in expected.items():
        np.testing.assert_array_equal(found.pairs[name].b, b.numpy(), err_msg=name)


# --- Text encoders ---


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_text_encoders(sdxl: nn.Module, level: str, tmp_path: Path) -> None:
    """Names of CLIP with and without ``text_model``; the second encoder's projection; T5."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPTextConfig(**sizes, vocab_size=99, projection_dim=8, bos_token_id=1, eos_token_id=2)
    t5 = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
    with torch.device("meta"):
        others = {
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": CLIPTextModelWithProjection(clip),
            "text_encoder_3": T5EncoderModel(t5),
        }
    square, wide = nn.Linear(8, 8), nn.Linear(8, 16)
    layer = f"{level.replace('.', '_')}encoder_layers_1"
    tensors = kohya(
        {
            f"lora_te1_{layer}_self_attn_q_proj": (square, 0),
            f"lora_te2_{layer}_mlp_fc1": (wide, 0),
            "lora_te2_text_projection": (square, 0),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (square, 0),
        }
    )
    old = f"text_encoder.{level}encoder.layers.0.self_attn.to_out_lora"
    tensors[f"{old}.down.weight"], tensors[f"{old}.up.weight"] = factors(square, RANK, 9)
    found = resolved(saved(tmp_path, tensors), sdxl, "unet", **others)
    assert list(found.pairs) == [
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
        "text_encoder_2.text_projection",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    ]


# --- What does not fit ---


def test_an_entry_that_matches_nothing(sdxl: nn.Module, tmp_path: Path) -> None:
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn3_to_q"
    tensors = kohya({name: (nn.Linear(16, 16), 0), "lora_unet_out_2": (sdxl.conv_out, 0)})
    with pytest.raises(CheckpointError, match=rf"no module '{name}'.*'{name.replace('attn3', 'attn1')}'"):
        resolved(saved(tmp_path, tensors), sdxl, "unet")
    tensors[f"{name}.lora_up.weight"].zero_()  # as some trainers leave what they did not train
    assert list(resolved(saved(tmp_path, tensors), sdxl, "unet").pairs) == ["conv_out"]


def test_a_text_encoder_that_the_base_lacks(sdxl: nn.Module, tmp_path: Path) -> None:
    tensors = kohya({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (nn.Linear(4, 4), 0)})
    with pytest.raises(CheckpointError, match=r"lora_te2_.*Expected modules of unet"):
        resolved(saved(tmp_path, tensors), sdxl, "unet")


@pytest.mark.parametrize("rows", [7, 3 * 3072])
def test_dimensions_of_another_base(flux: nn.Module, rows: int, tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_double_blocks_0_img_attn_proj": (nn.Linear(3072, 1), rows)})
    with pytest.raises(CheckpointError, match=rf"'transformer_blocks\.0\.attn\.to_out\.0'.* 3072 -> {rows}"):
        resolved(saved(tmp_path, tensors), flux)


def test_a_module_in_two_spellings(flux: nn.Module, tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_img_in": (flux.x_embedder, 0)})
    a, b = tensors["lora_unet_img_in.lora_down.weight"], tensors["lora_unet_img_in.lora_up.weight"]
    scale = tensors["lora_unet_img_in.alpha"] / RANK
    tensors |= {"transformer.x_embedder.lora_A.weight": a, "transformer.x_embedder.lora_B.weight": b * scale}
    assert list(resolved(saved(tmp_path, tensors), flux).pairs) == ["x_embedder"]
    tensors["transformer.x_embedder.lora_B.weight"] = b
    with pytest.raises(CheckpointError, match="'x_embedder' twice"):
        resolved(saved(tmp_path, tensors), flux)


def test_alphas_beside_a_configuration(flux: nn.Module, tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_img_in": (flux.x_embedder, 0)})
    config = '{"unet.r": 4, "unet.lora_alpha": 4}'
    with pytest.raises(CheckpointError, match="alpha tensors and a LoRA configuration"):
        resolved(saved(tmp_path, tensors, lora_adapter_metadata=config), flux)


def test_names_without_a_base(flux: nn.Module, tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_img_in": (flux.x_embedder, 0)})
    with pytest.raises(InputError, match="as kohya writes them"):
        resolve(saved(tmp_path, tensors), None)


def test_a_grouped_convolution(tmp_path: Path) -> None:
    model, *_ = sana()
    tensors = kohya(
        {"lora_unet_transformer_blocks_0_ff_conv_depth": (model.transformer_blocks[0].ff.conv_depth, 0)}
    )
    with pytest.raises((CheckpointError, UnsupportedError), match="conv_depth"):
        resolved(saved(tmp_path, tensors), model)


def test_effects_that_are_zero_do_not_matter(flux: nn.Module, tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_img_in": (flux.x_embedder, 0)})
    tensors["lora_unet_img_in.diff_b"] = torch.zeros(3072)
    assert list(resolved(saved(tmp_path, tensors), flux).pairs) == ["x_embedder"]
    tensors["lora_unet_img_in.diff_b"][0] = 1
    with pytest.raises(UnsupportedError, match=re.escape("'lora_unet_img_in.diff_b' is a LoRA bias")):
        resolved(saved(tmp_path, tensors), flux)
