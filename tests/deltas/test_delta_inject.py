"""Injection against golden vectors, PEFT and changed weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, DeltaTarget, inject
from hywu_runtime.errors import CheckpointError, DeltaError, UnsupportedError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "inject_linear"


def random_deltas(spec: DeltaSpec, delta_batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(delta_batch, *shape, generator=generator) * 0.5 * shape[-1] ** -0.5
        for name, shape in spec.tensors().items()
    }


def small_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Flatten(2),
        nn.Linear(16, 5),
    )


SMALL_SPEC_PATTERNS = ["0", "2", "3", "5"]


def small_input(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", ["with_bias", "no_bias"])
@pytest.mark.parametrize("lora", ["lora_b1", "lora_b2"])
@pytest.mark.parametrize("x", ["x3d", "x2d"])
def test_golden_linear(layer: str, lora: str, x: str) -> None:
    meta = json.loads((GOLDEN / "meta.json").read_text())
    data = load_file(GOLDEN / "data.safetensors")
    net = nn.ModuleDict(
        {layer: nn.Linear(meta["in_features"], meta["out_features"], bias=layer == "with_bias")}
    )
    net.load_state_dict({key: data[f"weights.{key}"] for key in net.state_dict()})
    spec = DeltaSpec.from_patterns(net, [layer], meta["rank"])
    deltas = {
        f"{layer}.lora_A": data[f"{lora}.layer.{layer}.lora_A"],
        f"{layer}.lora_B": data[f"{lora}.layer.{layer}.lora_B"] * data[f"{lora}.scale"],
    }
    with torch.no_grad(), inject(net, spec) as injection:
        torch.testing.assert_close(
            net[layer](data[f"input.{x}"]), data[f"output.{layer}.base.{x}"], atol=1e-6, rtol=0
        )
        injection.set(deltas)
        actual = net[layer](data[f"input.{x}"])
    torch.testing.assert_close(actual, data[f"output.{layer}.{lora}.{x}"], atol=3e-6, rtol=1e-6)


def peft_deltas(model: nn.Module) -> tuple[DeltaSpec, dict[str, Tensor]]:
    """The LoRA layers of a model that PEFT has wrapped, as canonical deltas."""
    targets, deltas = [], {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a = layer.lora_A["default"].weight.detach()
        b = layer.lora_B["default"].weight.detach() * layer.scaling["default"]
        conv = a.ndim == 4
        kernel = (a.shape[2], a.shape[3]) if conv else (1, 1)
        targets.append(
            DeltaTarget(path, "conv" if conv else "linear", a.shape[1], b.shape[0], a.shape[0], kernel)
        )
        deltas[f"{path}.lora_A"], deltas[f"{path}.lora_B"] = a[None], b.flatten(1)[None]
    return DeltaSpec(tuple(targets)), deltas


def randomise_lora(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5


def test_equals_peft_on_small_net() -> None:
    wrapped = inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=5, target_modules=SMALL_SPEC_PATTERNS), small_net()
    )
    randomise_lora(wrapped)
    spec, deltas = peft_deltas(wrapped)
    assert len(spec.targets) == 4
    x, net = small_input(2), small_net()
    with torch.no_grad(), inject(net, spec) as injection:
        injection.set(deltas)
        actual = net(x)
        assert not torch.allclose(actual, small_net()(x), atol=1e-2)
        torch.testing.assert_close(actual, wrapped(x), atol=1e-5, rtol=1e-5)


def small_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


UNET_PATTERNS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv*", "net.*", "time_emb_proj"]


def test_equals_peft_on_unet() -> None:
    spec = DeltaSpec.from_patterns(small_unet(), UNET_PATTERNS, 3)
    kinds = {(target.kind, target.kernel) for target in spec.targets}
    assert kinds == {("linear", (1, 1)), ("conv", (1, 1)), ("conv", (3, 3))}
    assert any("downsamplers" in target.module for target in spec.targets)
    wrapped = small_unet()
    inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=2, target_modules=[target.module for target in spec.targets]), wrapped
    )
    randomise_lora(wrapped)
    found, deltas = peft_deltas(wrapped)
    assert found == spec
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 8, generator=generator)
    t, text = torch.tensor([3.0, 500.0]), torch.randn(2, 5, 12, generator=generator)
    unet = small_unet()
    with torch.no_grad(), inject(unet, spec) as injection:
        base = unet(x, t, text).sample
        injection.set(deltas)
        actual = unet(x, t, text).sample
        expected = wrapped(x, t, text).sample
    assert (actual - base).abs().max() > 0.05
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding: str | tuple[int, int] = draw(
        st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2)))
    )
    strides = st.just((1, 1)) if padding == "same" else st.tuples(st.integers(1, 3), st.integers(1, 3))
    return nn.Conv2d(
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
        kernel,
        stride=draw(strides),
        padding=padding,
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    ).double()


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_convolution_equals_changed_weights(
    conv: nn.Conv2d, rank: int, rows: int, samples: int, shared: bool, gated: bool
) -> None:
    spec = DeltaSpec.from_patterns(nn.ModuleDict({"c": conv}), ["c"], rank)
    deltas = {k: v.double() for k, v in random_deltas(spec, 1 if shared else samples).items()}
    gate = (
        torch.linspace(-1, 2, samples, dtype=torch.double)
        if gated
        else torch.ones(samples, dtype=torch.double)
    )
    x = torch.randn(rows * samples, conv.in_channels, 9, 11, dtype=torch.double)
    with torch.no_grad(), inject(nn.ModuleDict({"c": conv}), spec) as injection:
        injection.set(deltas, gate if gated else None, rows)
        actual = conv(x)
    change = torch.einsum("dor,drikl->doikl", deltas["c.lora_B"], deltas["c.lora_A"]).expand(
        samples, *conv.weight.shape
    )
    for i in range(rows * samples):
        weight = conv.weight + gate[i % samples] * change[i % samples]
        expected = torch.func.functional_call(conv, {"weight": weight}, (x[i : i + 1],))
        torch.testing.assert_close(actual[i : i + 1], expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_linear_of_any_leading_dimensions(
    middle: list[int], features: int, out: int, rank: int, rows: int, samples: int
) -> None:
    net = nn.ModuleDict({"l": nn.Linear(features, out).double()})
    spec = DeltaSpec((DeltaTarget("l", "linear", features, out, rank),))
    deltas = {k: v.double() for k, v in random_deltas(spec, samples).items()}
    gate = torch.linspace(0.5, 2, samples, dtype=torch.double)
    x = torch.randn(rows * samples, *middle, features, dtype=torch.double)
    with torch.no_grad(), inject(net, spec) as injection:
        base = net["l"](x)
        injection.set(deltas, gate, rows)
        actual = net["l"](x)
    for i in range(rows * samples):
        s = i % samples
        expected = base[i] + gate[s] * x[i] @ (deltas["l.lora_B"][s] @ deltas["l.lora_A"][s]).T
        torch.testing.assert_close(actual[i], expected)


@pytest.fixture
def net() -> nn.Sequential:
    return small_net()


@pytest.fixture
def spec(net: nn.Sequential) -> DeltaSpec:
    return DeltaSpec.from_patterns(net, SMALL_SPEC_PATTERNS, 3)


def test_gate_zero_is_exact(net: nn.Sequential, spec: DeltaSpec) -> None:
    x = small_input(3)
    with inject(net, spec) as injection:
        injection.set(random_deltas(spec, 3), torch.tensor([0.0, 1.0, 0.0]))
        actual, base = net(x), small_net()(x)
    assert torch.equal(actual[[0, 2]], base[[0, 2]])
    assert not torch.allclose(actual[1], base[1], atol=1e-2)


def test_a_sample_does_not_depend_on_its_neighbours(net: nn.Sequential, spec: DeltaSpec) -> None:
    x, gate = small_input(3), torch.tensor([1.0, 0.5, 2.0])
    mixed = random_deltas(spec, 3)
    with torch.no_grad(), inject(net, spec) as injection:
        injection.set(mixed, gate)
        together = net(x)
        for i in range(3):
            injection.set({name: tensor[i : i + 1] for name, tensor in mixed.items()}, gate[i : i + 1])
            torch.testing.assert_close(net(x[i : i + 1]), together[i : i + 1])


def test_guidance_rows_share_deltas(net: nn.Sequential, spec: DeltaSpec) -> None:
    deltas, gate = random_deltas(spec, 2), torch.tensor([1.0, 0.5])
    rows = [small_input(2, seed) for seed in range(3)]
    with torch.no_grad(), inject(net, spec) as injection:
        injection.set(deltas, gate, rows=3)
        together = net(torch.cat(rows))
        injection.set(deltas, gate)
        torch.testing.assert_close(together, torch.cat([net(row) for row in rows]))


def test_shared_deltas_equal_repeated_ones(net: nn.Sequential, spec: DeltaSpec) -> None:
    x, deltas = small_input(2), random_deltas(spec)
    with torch.no_grad(), inject(net, spec) as injection:
        injection.set(deltas)
        shared = net(x)
        injection.set({name: tensor.repeat_interleave(2, 0) for name, tensor in deltas.items()})
        torch.testing.assert_close(net(x), shared)


def test_nothing_of_the_base_changes(net: nn.Sequential, spec: DeltaSpec) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = small_input(1)
    base = net(x)
    with inject(net, spec) as injection:
        assert torch.equal(net(x), base)  # nothing set yet
        injection.set(random_deltas(spec))
        assert not torch.equal(net(x), base)
        assert list(net.state_dict()) == list(before)
        injection.clear()
        assert torch.equal(net(x), base)
        injection.set(random_deltas(spec))
    assert torch.equal(net(x), base)
    assert all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with injection:  # a second time, without the deltas of the first
        assert torch.equal(net(x), base)


def test_hooks_are_removed_after_an_error(net: nn.Sequential, spec: DeltaSpec) -> None:
    with pytest.raises(DeltaError), inject(net, spec) as injection:
        injection.set({})
    assert all(not module._forward_hooks for module in net.modules())


def test_gradients_reach_deltas_and_gate(net: nn.Sequential, spec: DeltaSpec) -> None:
    deltas = {name: tensor.requires_grad_() for name, tensor in random_deltas(spec, 2).items()}
    gate = torch.ones(2, requires_grad=True)
    with inject(net, spec) as injection:
        injection.set(deltas, gate)
        net(small_input(2)).square().sum().backward()
    for tensor in (*deltas.values(), gate):
        assert tensor.grad is not None
        assert tensor.grad.abs().min(-1).values.sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_branch_runs_in_the_activations_dtype(
    net: nn.Sequential, spec: DeltaSpec, dtype: torch.dtype
) -> None:
    x, deltas = small_input(2), random_deltas(spec)
    with torch.no_grad():
        with inject(net, spec) as injection:
            injection.set(deltas, torch.ones(2))
            wide = net(x)
        net.to(dtype)
        with inject(net, spec) as injection:
            injection.set(deltas, torch.ones(2))
            narrow = net(x.to(dtype))
    assert narrow.dtype == dtype
    assert (narrow.float() - wide).norm() < 0.02 * wide.norm()


def changed(deltas: Mapping[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    result = {key: value for key, value in deltas.items() if key != name}
    return result if tensor is None else {**result, name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("5.lora_A", None, "'5.lora_A' is missing"),
        ("6.lora_A", torch.zeros(1, 3, 16), "'6.lora_A' has no target.*'5.lora_A'"),
        ("5.lora_A", torch.zeros(1, 2, 16), r"'5.lora_A' is \[1, 2, 16\].*\[D, 3, 16\]"),
        ("0.lora_B", torch.tensor(1.0), r"'0.lora_B' is \[\].*\[D, 8, 3\]"),
        ("5.lora_B", torch.zeros(2, 5, 3), "'5.lora_B' has delta batch 2, not 1"),
        ("5.lora_B", torch.zeros(1, 5, 3, dtype=torch.int8), "'5.lora_B' is torch.int8"),
    ],
)
def test_wrong_sets_are_named(
    net: nn.Sequential, spec: DeltaSpec, name: str, tensor: Tensor | None, message: str
) -> None:
    with inject(net, spec) as injection, pytest.raises(DeltaError, match=message):
        injection.set(changed(random_deltas(spec), name, tensor))


def test_wrong_batches_are_named(net: nn.Sequential, spec: DeltaSpec) -> None:
    with inject(net, spec) as injection:
        with pytest.raises(DeltaError, match=r"gate is \[1, 1\]"):
            injection.set(random_deltas(spec), torch.ones(1, 1))
        with pytest.raises(DeltaError, match="0 guidance rows"):
            injection.set(random_deltas(spec), rows=0)
        injection.set(random_deltas(spec, 2))
        with pytest.raises(DeltaError, match=r"'0' have delta batch 2. Expected 1, or 3"):
            net(small_input(3))
        injection.set(random_deltas(spec), torch.ones(2))
        with pytest.raises(DeltaError, match=r"gate has 2 entries. Expected 3"):
            net(small_input(3))
        injection.set(random_deltas(spec), rows=2)
        with pytest.raises(DeltaError, match=r"'0' ran with batch 3. Expected a multiple of the 2"):
            net(small_input(3))


def test_a_module_called_with_keywords() -> None:
    linear = nn.Linear(4, 3)
    spec = DeltaSpec((DeltaTarget("l", "linear", 4, 3, 2),))
    x = torch.randn(2, 4)
    with torch.no_grad(), inject(nn.ModuleDict({"l": linear}), spec) as injection:
        injection.set(random_deltas(spec))
        torch.testing.assert_close(linear(input=x), linear(x))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (DeltaTarget("6", "linear", 16, 5, 2), CheckpointError, "no module '6'"),
        (
            DeltaTarget("5", "linear", 15, 5, 2),
            CheckpointError,
            "'5' of the base model is a linear layer 16 -> 5, but",
        ),
        (DeltaTarget("0", "conv", 3, 8, 2, (1, 1)), CheckpointError, "a 3x3 convolution 3 -> 8, but .* 1x1"),
        (DeltaTarget("0", "linear", 3, 8, 2), CheckpointError, "'0'"),
        (DeltaTarget("1", "linear", 3, 8, 2), UnsupportedError, "'1' is a SiLU"),
    ],
)
def test_targets_that_do_not_fit(
    net: nn.Sequential, target: DeltaTarget, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        inject(net, DeltaSpec((target,)))


@pytest.mark.parametrize(
    ("module", "path", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "m", "'m' is a convolution with 2 groups"),
        (nn.MultiheadAttention(4, 2), "m.out_proj", "MultiheadAttention"),
        (nn.ConvTranspose2d(4, 4, 3), "m", "'m' is a ConvTranspose2d"),
    ],
)
def test_unsupported_modules_are_named(module: nn.Module, path: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        inject(nn.ModuleDict({"m": module}), DeltaSpec((DeltaTarget(path, "linear", 4, 4, 2),)))


def test_one_module_under_two_names() -> None:
    shared = nn.Linear(4, 4)
    targets = tuple(DeltaTarget(name, "linear", 4, 4, 2) for name in "ab")
    with pytest.raises(CheckpointError, match="'a' and 'b' are the same module"):
        inject(nn.ModuleDict({"a": shared, "b": shared}), DeltaSpec(targets))
