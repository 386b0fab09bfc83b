"""The names that other code bases give to a model's modules, from the names that diffusers gives them.

An original checkpoint's code often has one fused layer where diffusers has several: then a name stands for
slices of its rows. Which code base it is follows from the modules that there are, and numbers of blocks and
sizes of slices from the modules themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hywu_export.deltas.spec import DeltaTarget

Layers = Mapping[str, DeltaTarget]  # path in a component → the layer there; the rank says nothing


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a layer elsewhere, which are the whole of the layer ``path`` here.

    With ``swapped``, the halves change places: original adaLN layers make shift and scale, those of diffusers
    scale and shift.
    """

    path: str
    start: int
    stop: int
    swapped: bool = False


@dataclass(frozen=True)
class Spelling:
    """Names elsewhere → what they mean here; ``name`` is whose they are."""

    name: str
    meanings: Mapping[str, tuple[Piece, ...]]


def spellings(layers: Layers) -> list[Spelling]:
    """All spellings that are known for a component with these layers, diffusers' own first."""
    own = {path: (_whole(path, layers),) for path in layers}
    found = [Spelling("", own), Spelling("", _old_diffusers(layers))]
    if "conv_in" in layers and any(path.startswith("down_blocks.") for path in layers):
        found.append(Spelling("LDM", _ldm_unet(layers)))
    for name, mark, table in _TABLES:
        if mark in layers:
            found.append(Spelling(name, _from_table(table, layers)))
    return found


def _whole(path: str, layers: Layers, swapped: bool = False) -> Piece:
    return Piece(path, 0, layers[path].out_features, swapped)


_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _old_diffusers(layers: Layers) -> dict[str, tuple[Piece, ...]]:
    """The names of attention processors, of text encoders too; and CLIP with and without ``text_model``."""
    names: dict[str, tuple[Piece, ...]] = {}
    for path in layers:
        parent, _, last = path.rpartition(".")
        if path.endswith(".to_out.0"):
            names[path.removesuffix(".0")] = (_whole(path, layers),)
        elif parent.endswith("self_attn") and last in _OLD_PROJECTIONS:
            names[f"{parent}.{_OLD_PROJECTIONS[last]}"] = (_whole(path, layers),)
    for name, pieces in [*names.items(), *((path, (_whole(path, layers),)) for path in layers)]:
        if re.match(r"(text_model\.)?(encoder\.layers|embeddings)\.", name):
            short = name.removeprefix("text_model.")
            names |= {short: pieces, f"text_model.{short}": pieces}
    return names


# --- Stable Diffusion's UNet in the code of latent diffusion (SDXL's is called sgm) ---

_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
_RESNET |= {"conv_shortcut": "skip_connection"}
_LDM_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _ldm_unet(layers: Layers) -> dict[str, tuple[Piece, ...]]:
    """Blocks of one level stand in a row there: every resnet with its attention, and every resampler."""
    places: dict[str, str] = {}  # a module here → the module there
    number = 1
    for level in _numbers(layers, r"down_blocks\.(\d+)\."):
        block = f"down_blocks.{level}"
        for j in _numbers(layers, rf"{block}\.resnets\.(\d+)\."):
            places[f"{block}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"{block}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if f"{block}.downsamplers.0.conv" in layers:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places["mid_block.resnets.1"] = "middle_block.2"
    number = 0
    for level in _numbers(layers, r"up_blocks\.(\d+)\."):
        block = f"up_blocks.{level}"
        resnets = _numbers(layers, rf"{block}\.resnets\.(\d+)\.")
        for j in resnets:
            places[f"{block}.resnets.{j}"] = f"output_blocks.{number}.0"
            attends = any(path.startswith(f"{block}.attentions.{j}.") for path in layers)
            if attends:
                places[f"{block}.attentions.{j}"] = f"output_blocks.{number}.1"
            if j == resnets[-1]:
                places[f"{block}.upsamplers.0"] = f"output_blocks.{number}.{1 + attends}"
            number += 1
    names: dict[str, tuple[Piece, ...]] = {}
    for path in layers:
        there = _LDM_TOP.get(path) or places.get(path)
        if there is None:
            match = re.match(r"((down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|upsamplers)\.\d+", path)
            if match is None or match.group() not in places:
                continue
            rest = path[match.end() + 1 :]
            there = f"{places[match.group()]}.{_RESNET.get(rest, rest)}"
        names[there] = (_whole(path, layers),)
    return names


def _numbers(layers: Iterable[str], pattern: str) -> list[int]:
    """The numbers that the group of ``pattern`` matches at the start of paths, in order."""
    return sorted({int(match.group(1)) for path in layers if (match := re.match(pattern, path))})


# --- Transformers, as tables: name there → names here, whose rows follow one another there ---

_Table = Mapping[str, tuple[str, ...]]


def _block(here: str, there: str, parts: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Entries of numbered blocks: part there → parts here, separated by spaces."""
    return {
        f"{there}.{{}}.{part}": tuple(f"{here}.{{}}.{name}" for name in names.split())
        for part, names in parts.items()
    }


def _plain(parts: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {there: (here,) for there, here in parts.items()}


_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

_FLUX: _Table = {
    **_block(
        "transformer_blocks",
        "double_blocks",
        {
            "img_attn.qkv": _QKV,
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_attn.qkv": _ADDED_QKV,
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
            # xlabs' processors
            "qkv1": _QKV,
            "proj1": "attn.to_out.0",
            "qkv2": _ADDED_QKV,
            "proj2": "attn.to_add_out",
        },
    ),
    **_block(
        "single_transformer_blocks",
        "single_blocks",
        {
            "linear1": f"{_QKV} proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "qkv": _QKV,
            "proj": "proj_out",
        },
    ),
    **_plain(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    ),
}

_SD3: _Table = {
    **_block(
        "transformer_blocks",
        "joint_blocks",
        {
            "x_block.attn.qkv": _QKV,
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": _QKV.replace("attn", "attn2"),
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": _ADDED_QKV,
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
    ),
    **_plain(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    ),
}

_SANA: _Table = {
    **_block(
        "transformer_blocks",
        "blocks",
        {
            "attn.qkv": _QKV.replace("attn", "attn1"),
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.point_conv.conv": "ff.conv_point",
        },
    ),
    **_plain(
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
            "t_block.1": "time_embed.linear",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
}

_TABLES = (  # whose names, a module that this model alone has, the table
    ("BFL", "single_transformer_blocks.0.proj_mlp", _FLUX),
    ("MMDiT", "pos_embed.proj", _SD3),
    ("Sana", "caption_projection.linear_1", _SANA),
)


def _from_table(table: _Table, layers: Layers) -> dict[str, tuple[Piece, ...]]:
    names = {}
    for there, here in table.items():
        pattern = re.escape(here[0]).replace(r"\{\}", r"(\d+)") + "$"
        for number in _numbers(layers, pattern) if "{}" in there else ("",):
            paths = [path.replace("{}", str(number)) for path in here]
            if all(path in layers for path in paths):
                names[there.replace("{}", str(number))] = _pieces(paths, layers)
    return names


def _pieces(paths: Iterable[str], layers: Layers) -> tuple[Piece, ...]:
    pieces = []
    start = 0
    for path in paths:
        layer = layers[path]
        # AdaLayerNormContinuous, which makes two vectors; the others make three and more, in one order.
        swapped = path.endswith(("norm_out.linear", "norm1_context.linear"))
        swapped = swapped and layer.out_features == 2 * layer.in_features
        pieces.append(Piece(path, start, start + layer.out_features, swapped))
        start += layer.out_features
    return tuple(pieces)
