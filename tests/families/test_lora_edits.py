"""LoRA files, from a trainer to a picture, against the pipeline that loads the same file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import answer, refused
from parity import draws, largest, photos
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from pix2pix_reference import Reference
from safetensors.torch import load_file, save_file

from hywu_export.deltas import load_lora
from hywu_runtime import Deltas, Editor, Manifest

UNET = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "downsamplers.0.conv"]
TEXT = ["q_proj", "out_proj", "fc1"]
PHOTO, PROMPT = photos(1)[0], "make it sepia"
SHAPE = (1, 4, 16, 16)


def configs(seed: int, rank: int) -> tuple[LoraConfig, LoraConfig]:
    """Of the UNet and of the text encoder; in the first training ranks and scales differ by module."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"r": rank, "init_lora_weights": False, "lora_alpha": 1.5 * rank}
    if seed > 1:
        return LoraConfig(target_modules=UNET, **common), LoraConfig(target_modules=TEXT, **common)
    return (
        LoraConfig(target_modules=UNET, rank_pattern={"to_v": 2}, alpha_pattern={"conv1": 1}, **common),
        LoraConfig(target_modules=TEXT, alpha_pattern={"fc1": 2}, **common),
    )


def weaken(unet: Any) -> None:
    """Random adapters of a size that leaves pictures to compare."""
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data *= 0.5


def write(folder: Path, base: Path, seed: int, rank: int) -> None:
    """One trained pair of adapters in every form that PEFT's and diffusers' own writers give it."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import state_dict_utils
    from transformers import CLIPTextModel

    pipe = Reference(base).pipe
    layers, metadata = {}, {}
    for component, config in zip((pipe.unet, pipe.text_encoder), configs(seed, rank)):
        name = "unet" if component is pipe.unet else "text_encoder"
        component.add_adapter(config)
        if name == "unet":
            weaken(component)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(component, adapter_name="default")
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(folder / "diffusers", **layers, **metadata)
    pipe.save_lora_weights(folder, **layers, weight_name="plain.safetensors")
    plain = load_file(folder / "plain.safetensors")
    save_file(state_dict_utils.convert_state_dict_to_kohya(plain), folder / "kohya.safetensors")
    old = state_dict_utils.convert_state_dict_to_diffusers(plain)
    for key in list(old):  # it knows attention alone
        layer = "lora_linear_layer" if key.startswith("text") else "lora"
        name = key.replace("lora_A", f"{layer}.down").replace("lora_B", f"{layer}.up")
        old[name] = old.pop(key)
    save_file(old, folder / "old.safetensors")
    kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    for (name, kind), config in zip(kinds.items(), configs(seed, rank)):
        model = get_peft_model(kind.from_pretrained(base / name), config)
        if name == "unet":
            weaken(model)
        model.save_pretrained(folder / "peft" / name)


@pytest.fixture(scope="module")
def files(pair: Any, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """LoRA files of two trainings in ``first/`` and ``second/``."""

    def make(folder: Path) -> None:
        for name, seed, rank in (("first", 1, 4), ("second", 2, 3)):
            (folder / name).mkdir(parents=True)
            write(folder / name, pair.base, seed, rank)

    return once("lora_files", make)


@pytest.fixture(scope="module")
def adapted_bundle(pair: Any, files: Path, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """What ``hywu export --lora`` makes of two of them; beside it what it printed, ``export.json``."""

    def make(folder: Path) -> None:
        report = answer(
            "export", "--base", pair.base, "--lora", files / "first" / "kohya.safetensors",
            "--lora", files / "second" / "peft", "--max-rank", 7, "--max-steps", 4, "--batch", 2,
            "--max-size", 64, "--out", folder / "bundle",
        )  # fmt: skip
        (folder / "export.json").write_text(json.dumps(report))

    return once("adapted_bundle", make) / "bundle"


@pytest.fixture(scope="module")
def editor(adapted_bundle: Path) -> Iterator[Editor]:
    with Editor.load(adapted_bundle) as editor:
        yield editor


def edit(editor: Editor, deltas: Deltas | None, strength: float = 1.0, **options: Any) -> np.ndarray:
    picture = editor.edit(
        PHOTO, PROMPT, negative_prompt="ugly", steps=2, size=32, latents=draws(1, SHAPE, 7)[0], guidance=5.0,
        image_guidance=1.5, noise=draws(2, SHAPE, 3), deltas=deltas, delta_strength=strength, output="array",
        **options,
    )  # fmt: skip
    assert isinstance(picture, np.ndarray)
    return picture


def reference(pair: Any, *loads: tuple[Path, float]) -> np.ndarray:
    """What diffusers makes with files that it loads itself."""
    made = Reference(pair.base)
    for i, (file, _) in enumerate(loads):
        made.pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"a{i}")
    if loads:
        made.pipe.set_adapters([f"a{i}" for i in range(len(loads))], [weight for _, weight in loads])
    return pipeline_picture(made)


def pipeline_picture(made: Reference) -> np.ndarray:
    latents = draws(1, SHAPE, 7)[0]
    return made([(PHOTO, PROMPT)], steps=2, latents=latents, noise_seed=3, negative_prompt="ugly")[0]


FORMS = {
    "diffusers": "diffusers/pytorch_lora_weights.safetensors",
    "without metadata": "plain.safetensors",
    "kohya": "kohya.safetensors",
    "before PEFT": "old.safetensors",
}


@pytest.mark.parametrize(("form", "training"), [*((form, "first") for form in FORMS), ("kohya", "second")])
def test_the_picture_is_the_pipelines(
    form: str, training: str, editor: Editor, files: Path, pair: Any
) -> None:
    file = same = files / training / FORMS[form]
    if form == "kohya" and training == "first":
        # diffusers scales all attention by the most frequent alpha of such a file. Without alphas, which are
        # the ranks here, it is the same adapter.
        same = files / training / "plain.safetensors"
    got = edit(editor, load_lora(file, editor.bundle.root))
    assert largest([got], [reference(pair, (same, 1.0))]) <= 1
    assert largest([got], [edit(editor, None, 0.0)]) > 20


def test_folders_of_peft(editor: Editor, files: Path, pair: Any) -> None:
    """One for each component, which PEFT itself loads again."""
    folder = files / "first" / "peft"
    made = Reference(pair.base)
    PeftModel.from_pretrained(made.pipe.unet, folder / "unet")  # puts its layers into this very model
    PeftModel.from_pretrained(made.pipe.text_encoder, folder / "text_encoder")
    got = edit(editor, load_lora(folder, editor.bundle.root))
    assert largest([got], [pipeline_picture(made)]) <= 1


def test_the_text_encoder_matters(editor: Editor, files: Path) -> None:
    deltas = load_lora(files / "first" / "kohya.safetensors", editor.bundle.root)
    text = {name: array if name.startswith("text_encoder.") else 0 * array for name, array in deltas.items()}
    alone = edit(editor, Deltas(text))
    assert largest([alone], [edit(editor, None, 0.0)]) > 20
    assert largest([alone], [edit(editor, deltas)]) > 20


def test_several_with_weights(editor: Editor, files: Path, pair: Any) -> None:
    parts = [(files / "first" / "plain.safetensors", 0.75), (files / "second" / "kohya.safetensors", -0.5)]
    got = edit(editor, load_lora(parts, editor.bundle.root))
    assert largest([got], [reference(pair, *parts)]) <= 1


def test_strength_is_live_and_nothing_is_left_behind(editor: Editor, files: Path, pair: Any) -> None:
    first, second = (
        load_lora(files / name / "plain.safetensors", editor.bundle.root) for name in ("first", "second")
    )
    half = edit(editor, first, 0.5)
    assert largest([half], [reference(pair, (files / "first" / "plain.safetensors", 0.5))]) <= 1
    other = edit(editor, second)
    assert largest([half], [other]) > 20
    np.testing.assert_array_equal(edit(editor, first, 0.5), half)
    np.testing.assert_array_equal(edit(editor, second), other)
    np.testing.assert_array_equal(edit(editor, first, 0.0), edit(editor, None, 0.0))
    shape = (2, *SHAPE[1:])
    both = editor.edit_batch(
        [(PHOTO, PROMPT)] * 2, negative_prompt="ugly", steps=2, size=32, guidance=5.0, image_guidance=1.5,
        latents=np.broadcast_to(draws(1, SHAPE, 7)[0], shape), deltas=[first, second],
        noise=np.broadcast_to(draws(2, SHAPE, 3), (2, *shape)), delta_strength=[0.5, 1.0], output="array",
    )  # fmt: skip
    assert largest(both, [half, other]) <= 1


def test_two_commands(adapted_bundle: Path, editor: Editor, files: Path, tmp_path: Path) -> None:
    """From a pipeline and LoRA files to a picture: the export above, and this."""
    exported = json.loads((adapted_bundle.parent / "export.json").read_text())
    assert [(lora["spelling"], lora["rank"]) for lora in exported["loras"]] == [("kohya", 4), ("PEFT", 3)]
    spec = Manifest.read(adapted_bundle).deltas
    assert spec is not None
    assert {target.rank for target in spec.targets} == {7}
    photo, out = tmp_path / "photo.png", tmp_path / "edited.png"
    Image.fromarray(PHOTO).save(photo)
    first, second = files / "first" / "kohya.safetensors", files / "second" / "diffusers"
    report = answer(
        "edit", adapted_bundle, photo, PROMPT, "--lora", f"{first}:0.5", "--lora", second, "--steps", 2,
        "--seed", 5, "--size", "32x32", "--delta-strength", 0.8, "--out", out,
    )  # fmt: skip
    modules = len({key.partition(".")[0] for key in load_file(first)})
    assert report["loras"] == [
        {"file": str(first), "spelling": "kohya", "modules": modules, "rank": 4, "weight": 0.5},
        {"file": str(second), "spelling": "diffusers", "modules": modules, "rank": 3, "weight": 1.0},
    ]
    deltas = load_lora([(first, 0.5), (second, 1.0)], adapted_bundle)
    expected = editor.edit(PHOTO, PROMPT, steps=2, seed=5, size=32, delta_strength=0.8, deltas=deltas)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    # A delta file adds up with LoRA files too.
    made = tmp_path / "deltas.safetensors"
    converted = answer("deltas", "convert", f"{first}:0.5", second, "--bundle", adapted_bundle, "--out", made)
    assert [lora["spelling"] for lora in converted["loras"]] == ["kohya", "diffusers"]
    again = load_lora([(made, 1.0)], adapted_bundle)
    for name, array in deltas.items():
        other = name.replace("lora_A", "lora_B")
        if name.endswith("lora_A"):
            flat = [d[name][0].reshape(d[name].shape[1], -1) for d in (deltas, again)]
            np.testing.assert_allclose(
                deltas[other][0] @ flat[0], again[other][0] @ flat[1], rtol=1e-5, atol=1e-6
            )
            assert array.shape == again[name].shape


def test_more_than_the_bundle_takes(adapted_bundle: Path, files: Path, bundle: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(photo)
    file = files / "first" / "kohya.safetensors"
    arguments: Sequence[object] = ("edit", adapted_bundle, photo, PROMPT, "--out", tmp_path / "out.png")
    message = refused(*arguments, "--lora", file, "--lora", files / "first" / "diffusers")
    assert "together have rank 8" in message
    assert "up to rank 7" in message
    assert f"--lora {file}" in message
    assert "--max-rank 8" in message
    message = refused("edit", bundle, *arguments[2:], "--lora", file)  # the generator's targets are others
    assert "takes no deltas for" in message
    assert f"hywu export --base DIR --lora {file}" in message
    assert "--lora" in refused(*arguments, "--lora", file, "--deltas", file)
    assert "--lora" in refused(*arguments, "--lora", file, "--save-deltas", tmp_path / "d.safetensors")
    refused(*arguments, "--lora", f"{file}:nan")
    refused(*arguments, "--lora", tmp_path / "nowhere.safetensors")
    assert not (tmp_path / "out.png").exists()


def test_conversion_needs_no_torch(adapted_bundle: Path, files: Path) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'diffusers', 'onnx'])\n"
        "from hywu_export.deltas import load_lora; print(load_lora(sys.argv[1], sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, files / "first" / "kohya.safetensors", adapted_bundle]
    assert "targets, rank 7" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_a_file_holds(files: Path) -> None:
    shown = answer("deltas", "show", files / "first" / "kohya.safetensors")
    assert (shown["spelling"], shown["rank"]) == ("kohya", 4)
    assert all(name.startswith(("lora_unet_", "lora_te1_")) for name in shown["targets"])


@pytest.mark.slow
def test_the_text_encoders_graph_is_torchs(adapted_bundle: Path, pair: Any) -> None:
    checked = answer("verify", adapted_bundle, "--base", pair.base)
    assert checked["ok"]
    assert "text_encoder" in {check["name"] for check in checked["checks"]}


def test_what_a_generator_made_as_a_lora_file(bundle: Path, pair: Any, tmp_path: Path) -> None:
    """diffusers loads it, and makes the picture that the editor makes with its generated deltas."""
    with Editor.load(bundle) as generating:
        made = Deltas.stack([generating.generate(PHOTO, prompt, size=32) for prompt in (PROMPT, "a cat")])
        pictures = [edit(generating, made.select(i), sampler="euler_a") for i in (0, 1)]
    made.save(tmp_path / "made.safetensors")
    arguments = ("deltas", "to-lora", tmp_path / "made.safetensors", "--bundle", bundle, "--out")
    out = tmp_path / "lora.safetensors"
    written = answer(*arguments, out)["out"]
    assert written == [str(tmp_path / f"lora-{i}.safetensors") for i in (0, 1)]
    for file, picture in zip(written, pictures):
        assert largest([picture], [reference(pair, (Path(file), 1.0))]) <= 1
    assert largest(pictures[:1], pictures[1:]) > 2
    assert answer(*arguments, out, "--sample", 1)["out"] == [str(out)]
    assert out.read_bytes() == Path(written[1]).read_bytes()
    back = load_lora(out, bundle)
    for name, array in made.select(1).items():
        np.testing.assert_array_equal(back[name], array)
    refused(*arguments, tmp_path / "more.safetensors", "--sample", 2)
    refused(*arguments, tmp_path / "nowhere" / "lora.safetensors")
    assert not (tmp_path / "more.safetensors").exists()
