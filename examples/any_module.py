"""A language model and a hypernetwork in one bundle: `python examples/any_module.py`.

The hypernetwork reads a context and makes LoRA weights for every layer at once, in a layout of its own (A as
``[batch, layer, in, rank]``, B as ``[batch, layer, rank, out]``, the scale apart). The bundle converts them
inside its graph, the language model reads them as inputs, and one request runs both, without torch. The
result is compared with PyTorch and PEFT, which get the same weights one sample at a time.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hywu_export
from hywu_export import Generator, Layout, Pair
from hywu_runtime import Deltas, Editor

LAYERS, WIDTH, RANK, SCALE, CONTEXT = 2, 64, 4, 2.0, 24
TARGETS = {"q_proj": WIDTH, "v_proj": WIDTH // 2}  # output sizes; the model has half as many key/value heads


class Hypernetwork(nn.Module):
    """A context ``[B, 24]`` to ``{target: {"A": [B, layer, in, r], "B": [B, layer, r, out]}}``."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(CONTEXT, 32), nn.GELU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(32, LAYERS * RANK * (WIDTH + out)) for name, out in TARGETS.items()}
        )

    def forward(self, context: Tensor) -> dict[str, dict[str, Tensor]]:
        state = self.trunk(context)
        made = {}
        for name, out in TARGETS.items():
            numbers = 0.5 * self.heads[name](state).reshape(-1, LAYERS, WIDTH + out, RANK)
            made[name] = {"A": numbers[:, :, :WIDTH], "B": numbers[:, :, WIDTH:].transpose(2, 3)}
        return made


LAYOUT = Layout(
    [
        Pair(
            f"{name}.A",
            f"{name}.B",
            f"model.layers.{{layer}}.self_attn.{name}",
            a_axes="batch layer in rank",
            b_axes="batch layer rank out",
            scale=SCALE,
        )
        for name in TARGETS
    ]
)


def language_model() -> LlamaForCausalLM:
    """A random Llama of 2 layers and 256 words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def with_peft(ids: Tensor, weights: dict[str, dict[str, Tensor]]) -> Tensor:
    """The logits of PEFT's own LoRA layers, every sample by itself with its weights."""
    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=list(TARGETS))
    model = inject_adapter_in_model(config, language_model()).eval()
    logits = []
    for sample in range(len(ids)):
        for name, pair in weights.items():
            for layer in range(LAYERS):
                module = model.model.layers[layer].self_attn.get_submodule(name)
                module.lora_A["default"].weight.data = pair["A"][sample, layer].T.contiguous()
                module.lora_B["default"].weight.data = pair["B"][sample, layer].T.contiguous()
        logits.append(model(ids[sample : sample + 1]).logits)
    return torch.cat(logits)


@torch.no_grad()
def main(folder: Path) -> float:
    """Export to ``folder``, run, compare; the largest difference of any logit."""
    torch.manual_seed(1)
    hypernetwork = Hypernetwork().eval()
    traced = hywu_export.trace(
        language_model(),
        {"input_ids": torch.zeros(2, 8, dtype=torch.int64)},
        dynamic_shapes={"input_ids": ("batch", "sequence")},
        axes={"sequence": (2, 128)},
        outputs=["logits"],
        generator=Generator(hypernetwork, {"context": torch.zeros(2, CONTEXT)}, LAYOUT),
    )
    traced.save(folder)
    print(f"{folder}: {len(traced.spec.targets)} targets of rank {traced.spec.rank}")

    ids, context = torch.randint(0, 256, (3, 17)), torch.randn(3, CONTEXT)
    expected = with_peft(ids, hypernetwork(context)).numpy()
    with Editor.load(folder) as editor:
        inputs = {"input_ids": ids.numpy(), "context": context.numpy()}
        logits = editor.run(inputs)["logits"]
        plain = editor.run(inputs, delta_strength=0)["logits"]
        # The weights alone, kept and used again: the generator does not run.
        deltas: Deltas = editor.generate(inputs={"context": inputs["context"]})
        again = editor.run({"input_ids": inputs["input_ids"]}, deltas=deltas)["logits"]
    difference = float(np.abs(logits - expected).max())
    print(f"with the weights of each sample: {difference:.1e} from PyTorch with PEFT")
    print(f"given back as deltas:            {np.abs(again - logits).max():.1e} from that")
    print(f"without them (strength 0):       {np.abs(plain - logits).max():.1e} from that")
    return difference


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary) / "bundle") > 1e-4)
