"""Many parameters of a checkpoint that a module reads as one: the experts of a layer.

torch.export takes time and memory for every parameter. A layer of 64 experts is traced with one stacked
parameter instead of 64; `hywu_export.passes.stacks` puts the checkpoint's into the graph afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """Modules ``0``, ``1``, … of one kind, whose parameters are read for all of them at once.

    State dicts have every part's own parameters, as checkpoints do.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.count = len(parts)
        for index, part in enumerate(parts):
            self.add_module(str(index), part)

    def stacked(self, name: str) -> Tensor:
        """The parameters ``<part>.<name>``, along a new axis 0."""
        whole = self._parameters.get(_key(name))
        if whole is not None:  # within `traced_whole`
            return whole
        return torch.stack([self.get_parameter(f"{index}.{name}") for index in range(self.count)])


@contextmanager
def traced_whole(module: nn.Module) -> Iterator[dict[str, tuple[str, ...]]]:
    """Within the context, every `Stack` has one parameter without data for each that its parts have, and no
    parts.

    Gives the name of each such parameter → the names of those that it stacks, in order.
    """
    stacks: dict[str, tuple[str, ...]] = {}
    hidden: dict[Stack, dict[str, nn.Module | None]] = {}
    try:
        for path, stack in list(module.named_modules(remove_duplicate=False)):
            if not isinstance(stack, Stack):
                continue
            first = hidden[stack]["0"] if stack in hidden else stack.get_submodule("0")
            assert first is not None
            if stack not in hidden:
                hidden[stack] = dict(stack._modules)
                for index in range(stack.count):
                    del stack._modules[str(index)]
                for name, parameter in first.named_parameters():
                    shape = (stack.count, *parameter.shape)
                    whole = torch.empty(shape, dtype=parameter.dtype, device="meta")
                    stack._parameters[_key(name)] = nn.Parameter(whole, requires_grad=False)
            prefix = f"{path}." if path else ""
            for name, _ in first.named_parameters():
                parts = tuple(f"{prefix}{index}.{name}" for index in range(stack.count))
                stacks[f"{prefix}{_key(name)}"] = parts
        yield stacks
    finally:
        for stack, modules in hidden.items():
            for name in [n for n, p in stack._parameters.items() if p is not None and _is_whole(n)]:
                del stack._parameters[name]
            stack._modules.clear()
            stack._modules.update(modules)


_PREFIX = "stacked_"


def _key(name: str) -> str:
    return _PREFIX + name.replace(".", "_")


def _is_whole(name: str) -> bool:
    return name.startswith(_PREFIX)
