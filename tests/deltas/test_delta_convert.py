"""LoRA adapters, saved by PEFT and diffusers themselves, as deltas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, DeltaTarget, inject, peft_to_deltas
from hywu_runtime.errors import CheckpointError, DeltaError, HywuError, UnsupportedError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"to_q": nn.Linear(8, 8), "to_out": nn.Sequential(nn.Linear(8, 8)), "mix": nn.Conv2d(8, 8, 1)}
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        for block in self.blocks:
            x = block["mix"](x)
            x = x + block["to_out"](torch.tanh(block["to_q"](x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return x


TARGETS = ["conv", "to_q", "to_out.0", "mix"]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def save_adapter(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    model = get_peft_model(Net(), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def run(net: nn.Module, deltas: dict[str, Any], spec: DeltaSpec | None = None) -> Tensor:
    spec = spec or DeltaSpec.from_patterns(net, TARGETS, 4)
    with torch.no_grad(), inject(net, spec) as injection:
        injection.set({name: torch.from_numpy(array) for name, array in deltas.items()})
        return net(X)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2, "blocks.1.mix": 1}, "alpha_pattern": {"mix": 3, "to_out.0": 16}},
        # The first key that matches wins, anchors count, and a key matches whole parts of a path only.
        {"rank_pattern": {"^blocks.0.to_q": 1, "to_q": 3, "out.0": 2, "onv": 2}, "use_rslora": True},
        {"alpha_pattern": {r"blocks\.\d+\.mix": 1, "mix": 9, r".*to_(q|out\.0)": 2}},
        {
            "fan_in_fan_out": False,
            "layers_to_transform": [1],
            "layers_pattern": "blocks",
            "target_modules": ["to_q"],
        },
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_equals_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = save_adapter(tmp_path, **settings)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(Net(), path).eval()(X)
        assert (expected - Net()(X)).abs().max() > 0.05
    spec = DeltaSpec.from_patterns(Net(), TARGETS, 4)
    deltas = peft_to_deltas(path, spec)
    assert {name: array.shape[1:] for name, array in deltas.items()} == spec.tensors()
    assert all(array.dtype == np.float32 and len(array) == 1 for array in deltas.values())
    torch.testing.assert_close(run(Net(), deltas, spec), expected, atol=1e-5, rtol=1e-5)
    own = DeltaSpec.from_peft(path, Net())
    deltas = peft_to_deltas(path, own, Net())
    torch.testing.assert_close(run(Net(), deltas, own), expected, atol=1e-5, rtol=1e-5)


def test_own_specification(tmp_path: Path) -> None:
    path = save_adapter(tmp_path, rank_pattern={"to_q": 2})
    spec = DeltaSpec.from_peft(path, Net())
    assert [target.module for target in spec.targets][:3] == ["conv", "blocks.0.to_q", "blocks.0.to_out.0"]
    assert spec.targets[0] == DeltaTarget("conv", "conv", 3, 8, 4, (3, 3))
    assert spec.targets[1] == DeltaTarget("blocks.0.to_q", "linear", 8, 8, 2)
    assert spec.targets[3] == DeltaTarget("blocks.0.mix", "conv", 8, 8, 4, (1, 1))
    deltas, given = peft_to_deltas(path), peft_to_deltas(path, spec)
    assert deltas.keys() == given.keys()
    assert all(np.array_equal(deltas[name], given[name]) for name in given)


def test_larger_ranks_and_more_targets_are_filled_with_zeros(tmp_path: Path) -> None:
    path = save_adapter(tmp_path, target_modules=["to_q"])
    spec = DeltaSpec.from_patterns(Net(), TARGETS, 7)
    deltas = peft_to_deltas(path, spec)
    assert not deltas["conv.lora_A"].any()
    assert not deltas["conv.lora_B"].any()
    assert not deltas["blocks.0.to_q.lora_A"][:, 4:].any()
    assert not deltas["blocks.0.to_q.lora_B"][:, :, 4:].any()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(Net(), path)(X)
    torch.testing.assert_close(run(Net(), deltas, spec), expected, atol=1e-5, rtol=1e-5)


def test_a_named_adapter_in_the_keys(tmp_path: Path) -> None:
    path = save_adapter(tmp_path)
    expected = peft_to_deltas(path)
    tensors = load_file(path / "adapter_model.safetensors")
    named = {key.replace(".weight", ".style.weight"): tensor for key, tensor in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    assert all(np.array_equal(array, expected[name]) for name, array in peft_to_deltas(path).items())
    save_file(
        {**named, **{key: tensor.clone() for key, tensor in tensors.items()}},
        path / "adapter_model.safetensors",
    )
    with pytest.raises(UnsupportedError, match="more than one adapter"):
        peft_to_deltas(path)


def small_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("rank_pattern", [{}, {"to_k": 3}])
def test_equals_diffusers(tmp_path: Path, metadata: bool, rank_pattern: dict[str, int]) -> None:
    """A file that a pipeline saves, with and without the LoRA configuration in its metadata."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["to_q", "to_k", "conv1"],
        rank_pattern=rank_pattern,
        init_lora_weights=False,
    )
    unet = small_unet()
    unet.add_adapter(config)
    layers = get_peft_model_state_dict(unet)
    settings = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if metadata else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **settings)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 12)
    loaded = small_unet()
    loaded.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    base = small_unet()
    spec = DeltaSpec.from_peft(tmp_path, base)
    with torch.no_grad(), inject(base, spec) as injection:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        injection.set({name: torch.from_numpy(array) for name, array in peft_to_deltas(file, spec).items()})
        torch.testing.assert_close(base(x, t, text).sample, loaded(x, t, text).sample, atol=1e-5, rtol=1e-5)


def test_a_diffusers_model_saved_alone(tmp_path: Path) -> None:
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    spec = DeltaSpec.from_peft(tmp_path, small_unet())
    assert spec.targets
    name = spec.targets[0].b_name
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")[f"{name}.weight"]
    np.testing.assert_allclose(peft_to_deltas(tmp_path)[name][0], 2.5 * saved.numpy())


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": ["to_q"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["conv"], "target_modules": ["to_q"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_more_than_lora_is_refused_by_name(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = save_adapter(tmp_path, **settings)
    with pytest.raises(UnsupportedError, match=next(iter(settings))):
        peft_to_deltas(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["w1"]}, "target_parameters"),
        ({"use_something_new": True}, "use_something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"peft_type": "LOKR"}, "'LOKR'"),
        ({"peft_type": None}, "None"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(save_adapter(tmp_path), **changes)
    with pytest.raises(UnsupportedError, match=message):
        peft_to_deltas(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, "has rank 4. Expected 5"),
        ({"r": "4"}, "r is '4'"),
        ({"r": True}, "r is True"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern is"),
        ({"rank_pattern": {"to_q": -1}}, r"rank_pattern\['to_q'\] is -1"),
        ({"alpha_pattern": {"to_q": None}}, r"alpha_pattern\['to_q'\] is None"),
        ({"alpha_pattern": {"(": 1}}, r"'\(' in the adapter's alpha_pattern is no pattern"),
        ({"init_lora_weights": ["x"]}, "init"),
    ],
)
def test_malformed_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(save_adapter(tmp_path), **changes)
    with pytest.raises(HywuError, match=message):
        peft_to_deltas(tmp_path)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    get_peft_model(Net(), LoHaConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'LOHA'"):
        peft_to_deltas(tmp_path)


def test_embeddings_are_refused(tmp_path: Path) -> None:
    net = nn.ModuleDict({"tokens": nn.Embedding(5, 4)})
    get_peft_model(net, LoraConfig(r=2, target_modules=["tokens"])).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="a LoRA of an embedding"):
        peft_to_deltas(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unet.to_q.lokr_w1", "a factor of a LoKr.*extract_lora_from_models"),
        ("lora_unet_to_q.hada_w1_a", "a factor of a LoHa"),
        ("unet.to_q.lora_magnitude_vector", "DoRA.*fuse_lora"),
        ("lora_unet_to_q.dora_scale", "DoRA"),
        ("unet.to_q.lora_B.bias", "a LoRA bias"),
        ("lora_unet_to_q.diff_b", "a LoRA bias"),
        ("lora_unet_to_q.diff", "difference of a whole weight"),
        ("unet.to_q.oft_R.weight", "another kind of adapter"),
        ("bundle_emb.style.string_to_param", "textual inversion"),
        ("unet.to_q.weight", "is not a LoRA"),
    ],
)
def test_foreign_tensors_are_named(tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.ones(1, 2), key: torch.ones(2, 1)}, path)
    with pytest.raises(UnsupportedError, match=f"'{re.escape(key)}' .*{message}"):
        peft_to_deltas(path)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({}, CheckpointError, "holds no LoRA"),
        ({"m.lora_A.weight": torch.ones(1, 2)}, CheckpointError, r"'m' has only \.lora_A\.weight"),
        (
            {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(2, 2)},
            CheckpointError,
            r"\[2, 2\]",
        ),
        (
            {"m.lora_A.weight": torch.ones(1, 2, 3), "m.lora_B.weight": torch.ones(2, 1)},
            CheckpointError,
            "2, 3",
        ),
        (
            {"m.lora_A.weight": torch.ones(0, 2), "m.lora_B.weight": torch.ones(2, 0)},
            CheckpointError,
            r"\[0, 2\]",
        ),
        ({"m.lora_A.weight": torch.full((1, 2), torch.nan)}, DeltaError, "'m.lora_A.weight' .* not finite"),
        ({"m.lora_A.weight": torch.ones(1, 2, dtype=torch.int64)}, UnsupportedError, "dtype I64"),
    ],
)
def test_tensors_that_do_not_pair(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(error, match=message):
        peft_to_deltas(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_metadata(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"m.lora_A.weight": torch.ones(1, 2)}, path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is not"):
        peft_to_deltas(path)


def test_a_scale_that_overflows(tmp_path: Path) -> None:
    edit_config(save_adapter(tmp_path), lora_alpha=1e60)
    with pytest.raises(DeltaError, match="not finite after scaling"):
        peft_to_deltas(tmp_path)


def test_an_adapter_that_does_not_fit_the_specification(tmp_path: Path) -> None:
    path = save_adapter(tmp_path)
    with pytest.raises(DeltaError, match=r"'blocks\.0\.mix', which takes no deltas\..*'blocks\.0\.to_q'"):
        peft_to_deltas(path, DeltaSpec.from_patterns(Net(), ["conv", "to_q", "to_out.0"], 4))
    with pytest.raises(DeltaError, match=r"'conv' has rank 4. At most rank 3"):
        peft_to_deltas(path, DeltaSpec.from_patterns(Net(), TARGETS, 3))
    other = DeltaTarget("conv", "conv", 3, 8, 4, (1, 1))
    rest = DeltaSpec.from_patterns(Net(), TARGETS[1:], 4).targets
    with pytest.raises(
        DeltaError, match=r"A \[4, 3, 3, 3\] .* for module 'conv'\. Expected A \[r, 3, 1, 1\]"
    ):
        peft_to_deltas(path, DeltaSpec((other, *rest)))


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    path = save_adapter(tmp_path)
    net = Net()
    net.conv = nn.Conv2d(3, 8, 1)
    with pytest.raises(
        CheckpointError, match=r"'conv' of the base model is a 1x1 .* for a 3x3 convolution 3 -> 8"
    ):
        DeltaSpec.from_peft(path, net)
    with pytest.raises(CheckpointError, match="'conv' of the base model is a 1x1"):
        peft_to_deltas(path, None, net)
    del net.blocks[1]
    net.conv = Net().conv
    with pytest.raises(CheckpointError, match=r"no module '\S*blocks\.1\..*'\S*blocks\.0\."):
        DeltaSpec.from_peft(path, net)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_weights(tmp_path: Path, length: int) -> None:
    file = save_adapter(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        peft_to_deltas(tmp_path)


def test_a_damaged_configuration(tmp_path: Path) -> None:
    (save_adapter(tmp_path) / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        peft_to_deltas(tmp_path)


def test_pickles_and_missing_files(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "adapter")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    for pickle in (path, path / "adapter_model.bin"):
        with pytest.raises(UnsupportedError, match=r"adapter_model\.bin is pickled.*save it again"):
            peft_to_deltas(pickle)
    (path / "adapter_model.bin").unlink()
    for missing in (path, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is not a LoRA adapter"):
            peft_to_deltas(missing)


def test_weights_without_their_configuration(tmp_path: Path) -> None:
    """Their scale is unknown: it must not be taken to be 1."""
    path = save_adapter(tmp_path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scale is unknown.*adapter_config\.json"):
        peft_to_deltas(path / "adapter_model.safetensors")
