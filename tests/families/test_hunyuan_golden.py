"""HunyuanImage-3.0 against the published model's own numbers: a tiny stack from prompt to third step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hywu_export import ExportOptions, export
from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.hunyuan import reference
from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.experts import MixtureOfExperts
from hywu_export.families.hunyuan.model import HunyuanImage3
from hywu_export.families.hunyuan.schedule import ShiftedFlowScheduler
from hywu_export.families.hunyuan.sequence import Tokens
from hywu_export.generator import GeneratorConfig
from hywu_runtime import Editor
from hywu_runtime.program import Executor, Request, make_plan, resolve_axes
from hywu_runtime.schedule import Schedule

DATA = Path(__file__).parents[1] / "data" / "golden"
GOLDEN, MOE = DATA / "hy_decoder", DATA / "inject_moe"
META = json.loads((GOLDEN / "meta.json").read_text())
TOLERANCE = 5e-5
PROMPT = 26  # where the request's own tokens begin
# The golden case knows its tokens by number only, and has one size.
TOKENS = Tokens(
    prefix=(1, 22, 32, 7, 48, 7),
    assistant=(27, 9, 40),
    answer=(58,),
    boi=50,
    eoi=51,
    size=56,
    ratios=(57,) * 37,
    separator=55,
    cfg=53,
    pad=0,
    thoughts=(60,),
)
MODES = pytest.mark.parametrize("mode", ["base", "lora"])


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "outputs.safetensors")


@pytest.fixture(scope="module")
def network() -> HunyuanImage3:
    module = HunyuanImage3(HunyuanConfig.from_dict(META["config"])).eval().requires_grad_(False)
    module.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    return module


def close(found: Any, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted.numpy(), rtol=0, atol=tolerance)


def make_photo(given: dict[str, torch.Tensor]) -> reference.Photo:
    rows, columns = given["cond.vit_spatial_shapes"][0].tolist()
    return reference.Photo(given["cond.vae_latents"], given["cond.vit_pixel_patches"], (rows, columns))


def suffix(given: dict[str, torch.Tensor], row: int) -> list[int]:
    """Ids of prompt, role and thoughts in a guidance row."""
    return given["gen.input_ids"][row, PROMPT:38].tolist()


def test_prefill(network: HunyuanImage3, given: Any, expected: Any) -> None:
    photo = make_photo(given)
    sequence = reference.prompt_sequence(network, TOKENS, suffix(given, 0), photo)
    assert torch.equal(sequence.mask(), given["text.attention_mask"] > 0)
    cos, sin = network.rotary(torch.tensor(sequence.positions)[None])
    close(cos[:, 0], expected["text.rope_cos"])
    close(sin[:, 0], expected["text.rope_sin"])
    close(network.see(photo.patches, torch.tensor(photo.grid)), expected["cond.vit_tokens"])
    close(torch.cat(sequence.embeddings)[None], expected["text.hidden_states.0"])
    hidden = reference.hidden_states(network, sequence)
    close(hidden[None], expected["text.condition"])
    close(network.lm_head(network.model.ln_f(hidden))[None], expected["text.logits"])


def test_the_other_kind_of_mask(given: Any) -> None:
    config = HunyuanConfig.from_dict(META["config"] | {"cond_token_attn_type": "full"})
    assert not config.joint_attention
    sequence = reference.TokenSequence([], [(0, 0)] * 58, [(10, 16), (17, 25), (43, 55)])
    assert torch.equal(sequence.mask()[0], given["gen.attention_mask_if_full"][0] > 0)


def delta_tensors(network: HunyuanImage3, expected: Any) -> tuple[DeltaSpec, dict[str, torch.Tensor]]:
    config = GeneratorConfig.from_file(GOLDEN / "generator" / "config.json")
    spec = DeltaSpec.from_generator(config, None, network)
    scale = {"A": 1.0, "B": float(expected["pg.scale"])}
    return spec, {name: expected[f"pg.{name}"] * scale[name[-1]] for name in spec.tensors()}


@MODES
def test_guided_steps(network: HunyuanImage3, given: Any, expected: Any, mode: str) -> None:
    """Every step on the whole sequence."""
    spec, deltas = delta_tensors(network, expected)
    assert [t.kind for t in spec.targets[:3]] == ["experts"] * 3
    scheduler = ShiftedFlowScheduler(shift=META["flow_shift"])
    scheduler.set_timesteps(3)
    latents, photo = given["gen.latents0"], make_photo(given)
    with inject(network, spec) as injection:
        injection.set(deltas, torch.full((1,), float(mode == "lora")))
        for step, time in enumerate(scheduler.timesteps):
            rows = [
                reference.velocity(network, TOKENS, suffix(given, row), photo, latents, time[None])
                for row in (0, 1)
            ]
            name = f"gen.{mode}.step{step}"
            close(torch.cat(rows), expected[f"{name}.pred_cond_uncond"])
            guided = rows[1] + META["guidance_scale"] * (rows[0] - rows[1])
            close(guided, expected[f"{name}.velocity_cfg"])
            latents = scheduler.step(guided, time, latents, return_dict=False)[0]
            close(latents, expected[f"{name}.latents_next"])


@pytest.mark.parametrize("steps", [3, 50])
def test_schedule(expected: Any, steps: int) -> None:
    scheduler = ShiftedFlowScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    close(scheduler.sigmas, expected[f"scheduler{steps}_shift3.sigmas"], 1e-6)
    close(scheduler.timesteps, expected[f"scheduler{steps}_shift3.timesteps"], 1e-3)


@pytest.fixture(scope="module")
def golden_bundle(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The golden checkpoint, which has no VAE, with its generator."""

    def make(folder: Path) -> None:
        base = folder / "base"
        base.mkdir(parents=True)
        kind = {"model_type": "hunyuan_image_3_moe", "architectures": ["HunyuanImage3ForCausalMM"]}
        (base / "config.json").write_text(json.dumps(META["config"] | kind))
        shutil.copy(GOLDEN / "model.safetensors", base)
        (base / "tokenizer.json").write_text(_TOKENIZER)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hywu_export.families.hunyuan_image3.read_tokens", lambda *_: TOKENS)
            export(folder / "bundle", base, GOLDEN / "generator", ExportOptions(max_steps=3, max_batch=2))

    return once("hunyuan_golden", make) / "bundle"


_TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}'


@pytest.fixture(scope="module")
def editor(golden_bundle: Path) -> Iterator[Editor]:
    with Editor.load(golden_bundle, "ort-cpu") as editor:
        yield editor


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("steps", [1, 3])
def test_the_exported_program(editor: Editor, given: Any, expected: Any, mode: str, steps: int) -> None:
    """The bundle's program through the runtime: vision, condition, generator, cache, guided steps."""
    manifest = editor.bundle.manifest
    length = next(v for v in manifest.graphs["sequence"].outputs if v.name == "sequence.ids").shape[1]
    values: dict[str, Any] = {"gate": np.full(1, float(mode == "lora"), np.float32)}
    for name, row in (("sequence.ids", 0), ("sequence.unconditional", 1)):
        ids = given["gen.input_ids"][row : row + 1, PROMPT:41].numpy()
        values[name] = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
    values["sequence.mask"] = np.int64(np.arange(length) < ids.shape[1])[None]
    values |= {
        "image.latents": given["cond.vae_latents"].numpy(),
        "vit.patches": given["cond.vit_pixel_patches"].numpy(),
        "vit.grid": given["cond.vit_spatial_shapes"][0].numpy(),
        "noise.initial": given["gen.latents0"].numpy(),
        "guidance.text": np.full(1, META["guidance_scale"], np.float32),
        "initial_scale": np.ones((), np.float32),
    }
    assert manifest.schedules is not None
    rows = Schedule(editor.bundle.file(manifest.schedules.file), manifest.schedules).rows(None, 3)
    wanted = ["latents.next", "history.next", "image.vit", "condition.after", *manifest.results.deltas]
    plan = make_plan(manifest, wanted, frozenset(values), guided=True)
    per_step = {
        "timestep": lambda i: np.asarray(rows.timesteps[i]),
        "coefficients": lambda i: np.asarray(rows.coefficients[i]),
        "noise.step": lambda i: np.zeros_like(values["noise.initial"]),
    }
    request = Request(resolve_axes(manifest, 1, values), values, per_step, steps, (), None, None)
    executor = Executor(editor.bundle, editor.backend)
    try:
        found = executor.run(plan, request)
    finally:
        executor.close()
    name = f"gen.{mode}.step{steps - 1}"
    close(found["latents.next"], expected[f"{name}.latents_next"])
    close(found["history.next"][:, 1], expected[f"{name}.velocity_cfg"])
    close(found["image.vit"], expected["cond.vit_tokens"])
    close(found["condition.after"][:, : 41 - 16], expected["text.condition"][:, 16:])
    scale = {"A": 1.0, "B": float(expected["pg.scale"])}
    for name in manifest.results.deltas:
        close(found[name], expected[f"pg.{name}"] * scale[name[-1]])


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("mode", ["base", "lora"])
def test_expert_layer(mode: str, block: int) -> None:
    """One layer's experts, shared and routed, with deltas on all five projections; two samples at once."""
    data = load_file(MOE / "data.safetensors")
    settings = json.loads((MOE / "meta.json").read_text())["config"]
    config = HunyuanConfig.from_dict(
        META["config"]
        | {
            "hidden_size": settings["hidden_size"],
            "num_experts": settings["num_experts"],
            "moe_topk": settings["moe_topk"],
            "moe_intermediate_size": settings["moe_intermediate_size"],
        }
    )
    layer = MixtureOfExperts(config).requires_grad_(False)
    layer.experts.block = block
    prefix = "weights.mlp."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)})
    x = data["input.hidden_states"]
    chosen, shares = layer.gate(x)
    assert torch.equal(chosen.flatten(0, 1), data["router.topk_idx"])
    close(shares.flatten(0, 1), data["router.topk_weight"], 2e-5)
    names = ("experts.w1", "experts.w2", "experts.w3", "shared_mlp.gate_and_up_proj", "shared_mlp.down_proj")
    spec = DeltaSpec.from_patterns(layer, names, settings["rank"])
    deltas = {
        name: data[f"lora.model.layers.0.mlp.{name}"] * (float(data["lora.scale"]) if name[-1] == "B" else 1)
        for name in spec.tensors()
    }
    with inject(layer, spec) as injection:
        injection.set(deltas, torch.full((2,), float(mode == "lora")))
        close(layer(x), data[f"output.{mode}"], 2e-5)
        close(layer.shared_mlp(x), data[f"output.{mode}.shared_only"], 2e-5)
        close(layer.experts(x, chosen, shares), data[f"output.{mode}.experts_only"], 2e-5)
        # A set per sample, which the published code cannot: each as if it were alone.
        own = {name: torch.cat([tensor, 0.5 * tensor]) for name, tensor in deltas.items()}
        injection.set(own)
        together = layer(x)
        for sample in (0, 1):
            injection.set({name: tensor[sample : sample + 1] for name, tensor in own.items()})
            close(together[sample : sample + 1], layer(x[sample : sample + 1]), 2e-5)


@pytest.mark.slow
@pytest.mark.rtx
def test_tensorrt_rtx_takes_every_graph(golden_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from hywu_export.engines.tensorrt import TensorRT

    for path in sorted(golden_bundle.glob("*.onnx")):
        with open(os.devnull, "w") as log:
            TensorRT("tensorrt-rtx", log).parse(path)  # raises what it does not take
