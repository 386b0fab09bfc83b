"""HunyuanImage-3.0 as a family: a tiny random checkpoint with a VAE, exported with a generator, linked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_hunyuan import CONFIG, make_base, make_generator

from hywu_export import ExportOptions, export
from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.families import open_base
from hywu_export.families.base import ReferenceEdit
from hywu_export.families.hunyuan import reference
from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.sequence import Suffix, Tokens, buckets, read_tokens, system_prompt
from hywu_export.families.hunyuan.vae import _fold, _unfold
from hywu_export.families.hunyuan.vision import Patches, VisionTransformer, patch_grid
from hywu_export.families.hunyuan_image3 import HunyuanImage3Instruct
from hywu_runtime import Deltas, Editor, Manifest
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError
from tools.check_graphs import check_graph

PROMPT = "make it sepia<think>why red</think><recaption>warm sepia</recaption>"
SIZE = "96x64"
Once = Callable[[str, Callable[[Path], None]], Path]


@dataclass(frozen=True)
class Made:
    base: Path
    generator: Path
    bundle: Path

    @property
    def sources(self) -> dict[str, Path]:
        return {"base": self.base, "generator": self.generator}


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Path:
    return once("hunyuan_base", make_base)


@pytest.fixture(scope="session")
def made(checkpoint: Path, once: Once) -> Made:
    def make(folder: Path) -> None:
        make_generator(folder / "generator")
        options = ExportOptions(max_steps=4, steps=2, max_batch=2, link_weights=True)
        with pytest.MonkeyPatch.context() as patch:  # gathered, as at full size; torch's reference is dense
            patch.setattr("hywu_export.families.hunyuan.experts.block_size", lambda *_: 8)
            export(folder / "bundle", checkpoint, folder / "generator", options)

    folder = once("hunyuan_bundle", make)
    return Made(checkpoint, folder / "generator", folder / "bundle")


@pytest.fixture(scope="module")
def editor(made: Made) -> Iterator[Editor]:
    with Editor.load(made.bundle, "ort-cpu", sources=made.sources) as editor:
        yield editor


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def noise(seed: int = 0, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, 16, 24)).astype(np.float32)


def largest(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(np.int16(a) - np.int16(b)).max())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.5, 1.0])
def test_an_edit_is_that_without_cache(editor: Editor, made: Made, scale: float) -> None:
    arguments = {"steps": 2, "size": SIZE, "output": "array", "guidance": scale, "latents": noise()}
    found = editor.edit(photo(), PROMPT, delta_strength=0.0, **arguments)
    family = open_base(made.base)
    assert isinstance(family, HunyuanImage3Instruct)
    edit = ReferenceEdit(photo(), PROMPT, family.sampler, 2, noise(), 0, {"text": scale})
    assert largest(found, family.reference_edit(edit)) <= 1
    for other, prompt in ((photo(1), PROMPT), (photo(), "blur it")):
        assert largest(found, editor.edit(other, prompt, delta_strength=0.0, **arguments)) > 5


@pytest.mark.slow
def test_a_batch_with_deltas_of_its_own(editor: Editor, tmp_path: Path) -> None:
    requests = [(photo(0), PROMPT), (photo(1), "make it red")]
    arguments = {"steps": 2, "size": SIZE, "output": "array"}
    together = editor.edit_batch(requests, latents=noise(count=2), **arguments)
    for i, (picture, prompt) in enumerate(requests):
        alone = editor.edit(picture, prompt, latents=noise(count=2)[i : i + 1], **arguments)
        assert largest(together[i], alone) <= 1
        deltas = editor.generate(picture, prompt, size=SIZE)
        deltas.save(tmp_path / "deltas.safetensors")
        again = Deltas.load(tmp_path / "deltas.safetensors")
        given = editor.edit(picture, prompt, deltas=again, latents=noise(count=2)[i : i + 1], **arguments)
        assert largest(given, alone) == 0
        plain = editor.edit(
            picture, prompt, delta_strength=0.0, latents=noise(count=2)[i : i + 1], **arguments
        )
        assert largest(plain, alone) > 5
    assert deltas["model.layers.0.mlp.experts.w2.lora_A"].shape == (1, 4, 2, 32)


@pytest.mark.slow
def test_what_is_linked(made: Made) -> None:
    """Every weight that a graph reads stays in the checkpoint: the experts, each for itself, too."""
    manifest = Manifest.read(made.bundle)
    linked = manifest.linked["step.onnx"]
    experts = [name for name in linked if ".experts." in name]
    assert len(experts) == 2 * 2 * 4
    assert not (made.bundle / "weights" / "transformer.safetensors").exists()
    assert not any(name.startswith("prompt.") for name in linked)
    experts = [target for target in manifest.deltas.targets if target.kind == "experts"]
    assert [target.module.rsplit(".", 1)[1] for target in experts[:3]] == ["w1", "w2", "w3"]
    assert all(target.experts == 4 for target in experts)


@pytest.mark.slow
def test_every_graph_is_valid_onnx(made: Made) -> None:
    """By ONNX's own checker and strict shape inference, with the linked weights where the graphs say."""
    bundle = Bundle.open(made.bundle, sources=made.sources)
    found = {name: check_graph(bundle, name) for name in bundle.manifest.graphs}
    index = SafetensorsIndex.from_folder(made.base)
    experts = sum(tensor.length for name, tensor in index.items() if ".mlp.experts." in name)
    assert found["step"].external_bytes > experts
    assert all(graph.shaped >= graph.nodes for graph in found.values())


@pytest.mark.slow
def test_verify(made: Made) -> None:
    from cli_tools import answer

    report = answer("verify", made.bundle, "--base", made.base, "--generator", made.generator)
    assert report["ok"], report


def test_text_that_is_too_long(editor: Editor) -> None:
    with pytest.raises(InputError, match="token"):
        editor.edit(photo(), "make it red " * 40, size=SIZE, steps=1)


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> Tokens:
    return read_tokens(checkpoint, 64)


@settings(max_examples=30)
@given(st.data())
def test_the_suffix(tokens: Tokens, data: st.DataObject) -> None:
    """Prompts with and without thoughts, of every length up to the limit, in one batch."""
    length = 9
    kinds = [tokens.thoughts[0], tokens.thoughts[1], 60, 61, 62]
    rows = data.draw(st.lists(st.lists(st.sampled_from(kinds), max_size=length), min_size=1, max_size=3))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    outputs = Suffix(tokens)(ids, mask)
    for row, said, unconditional, valid in zip(rows, *outputs):
        expected = [[*text, *tokens.tail] for text in reference.texts(tokens, row)]
        count = int(valid.sum())
        assert valid.tolist() == [1] * count + [0] * (length + tokens.added - count)
        assert said.tolist() == expected[0] + [tokens.pad] * (length + tokens.added - count)
        assert unconditional.tolist() == expected[1] + [tokens.pad] * (length + tokens.added - count)


def test_tokens(tokens: Tokens, checkpoint: Path, tmp_path: Path) -> None:
    assert system_prompt(checkpoint) == "you edit photos"
    assert len(tokens.prefix) == 1 + 3 + 1 + 1  # bos, system prompt, line break, role
    assert tokens.prefix[0] == 1
    folder = shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("model*"))
    (folder / "system_prompt.py").write_text("a = 1\n")
    with pytest.raises(CheckpointError, match="system prompt 'en_unified'"):
        read_tokens(folder, 64)
    (folder / "generation_config.json").write_text("{}")
    assert len(read_tokens(folder, 64).prefix) == 2
    with pytest.raises(CheckpointError, match="no token <img_size_1024>"):
        read_tokens(folder, 1024)


def test_buckets() -> None:
    sizes = buckets(1024)
    assert len(sizes) == 37
    assert sizes[0] == (512, 2048)
    assert sizes[16] == (1024, 1024)
    assert sizes[32:] == [(2048, 512), (1024, 768), (1280, 720), (768, 1024), (720, 1280)]


def test_vision_transformer_is_siglip_2() -> None:
    """Against transformers' own, with padding patches and a grid of another aspect."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    theirs = Siglip2VisionModel(
        Siglip2VisionConfig(**CONFIG["vit"], vision_use_head=False, attn_implementation="sdpa")
    ).eval()
    ours = VisionTransformer(HunyuanConfig.from_dict(CONFIG).vision).eval()
    ours.load_state_dict(theirs.state_dict())
    patches = torch.randn(2, 12, 48)
    for grid in ((2, 5), (3, 4), (1, 7), (6, 2)):
        valid = (torch.arange(12) < grid[0] * grid[1]).long().expand(2, -1)
        with torch.no_grad():
            expected = theirs(patches, valid, torch.tensor([grid, grid])).last_hidden_state
            found = ours(patches, torch.tensor(grid))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 32), (40, 44)])
def test_patches_are_those_of_a_resized_photo(height: int, width: int) -> None:
    config = HunyuanConfig.from_dict(CONFIG).vision
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    found, grid = Patches(config, 4, 128)(torch.from_numpy(pixels)[None])
    rows, columns = grid.tolist()
    assert (rows, columns) == patch_grid(height, width, 4, 12)
    assert rows * columns <= 12
    picture = Image.fromarray(pixels).resize((columns * 4, rows * 4), Image.Resampling.BILINEAR)
    resized = np.asarray(picture).astype(np.float32) / 127.5 - 1
    cells = resized.reshape(rows, 4, columns, 4, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    difference = np.abs(found[0, : rows * columns].numpy() - cells)
    assert difference.max() <= 1.01 / 127.5  # Pillow rounds between the two directions
    assert not found[0, rows * columns :].any()


def test_folding_is_the_published_order() -> None:
    """Channels of a folded tensor: frame, row and column within the block, then the channel."""
    x = torch.arange(2 * 3 * 4 * 4 * 6.0).reshape(2, 3, 4, 4, 6)
    folded = _fold(x, 2)
    for f, r, c, channel in ((0, 0, 0, 0), (1, 0, 1, 2), (1, 1, 0, 1)):
        index = ((f * 2 + r) * 2 + c) * 3 + channel
        assert torch.equal(folded[:, index], x[:, channel, f::2, r::2, c::2])
    assert torch.equal(_unfold(folded, 2), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, "sets patch_size to 2"),
        ({"cond_token_attn_type": "none"}, "cond_token_attn_type"),
        ({"moe_topk": [1, 2]}, "moe_topk differs"),
        ({"vit": None}, "cannot be read"),
    ],
)
def test_other_networks_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        HunyuanConfig.from_dict(CONFIG | change)


def test_targets_outside_the_decoder(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'patch_embed.model.0' is a delta target"):
        export(tmp_path / "b", checkpoint, options=ExportOptions(targets=["patch_embed.model.0"]))


def test_a_generator_of_another_width(checkpoint: Path, tmp_path: Path) -> None:
    make_generator(tmp_path / "generator")
    config = json.loads((tmp_path / "generator" / "config.json").read_text())
    config["pg_mapping"]["mlp.experts"]["num_experts"] = 2
    (tmp_path / "generator" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"hw_pos|experts"):
        export(tmp_path / "b", checkpoint, tmp_path / "generator")
