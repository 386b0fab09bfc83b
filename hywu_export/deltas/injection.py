"""Deltas in a torch module, by forward hooks: ``y = f(x) + gate * (x A^T) B^T`` for every target, per sample;
or, for targets that are ``merged``, ``y = x (W + gate * B A)^T + bias``.

The form is made for tracing: plain broadcasting products, and for k x k convolutions one constant grouped
convolution, so that deltas stay inputs of the graph and may differ from sample to sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hywu_export.deltas.experts import ExpertLinear
from hywu_export.deltas.modules import resolve
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, nearest
from hywu_runtime.errors import DeltaError


def inject(module: nn.Module, spec: DeltaSpec) -> Injection:
    """Prepare ``module`` to take the deltas of ``spec``; its parameters and state-dict keys stay as they are.

    The result is a context manager, which may be entered again; the hooks exist only inside::

        with inject(unet, spec) as injection:
            injection.set(deltas, gate)
            unet(x)

    Raises:
        CheckpointError: a target is missing in ``module``, has other dimensions, or is there twice.
        UnsupportedError: a target is of a type that takes no deltas.
    """
    return Injection(module, spec)


class Injection:
    """Deltas at work in one module tree; see `inject`. Until `set` is called the base runs unchanged."""

    def __init__(self, module: nn.Module, spec: DeltaSpec):
        self.spec = spec
        modules = resolve(module, spec)
        self._branches = [_branch(target, modules[target.module]) for target in spec.targets]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Injection:
        if not self._handles:
            self._handles = [branch.attach() for branch in self._branches]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def set(self, deltas: Mapping[str, Tensor], gate: Tensor | None = None, rows: int = 1) -> None:
        """Use ``deltas`` from the next forward on; gradients flow to them and to ``gate``.

        Args:
            deltas: every tensor of ``spec.tensors()`` with a leading axis D, which is 1 or B; any
                floating-point dtype, cast to that of the activations.
            gate: ``[B]``, multiplies the delta of each sample; at 0 the base's result is exact (of merged
                targets, within rounding). None stands for 1.
            rows: guidance rows. Activations have batch ``rows * B``, ordered [row 0 of all samples, row 1 of
                all samples, ...], and every row gets the same deltas and gate.

        Raises:
            DeltaError: a tensor, which is named, is missing, extra, mis-typed or mis-shaped. A D or a gate
                that does not fit the batch is found by the forward, which raises this too.
        """
        self._check(deltas, gate, rows)
        for branch in self._branches:
            a, b = deltas[branch.target.a_name], deltas[branch.target.b_name]
            branch.active = _Active(a, b, gate, rows)

    def clear(self) -> None:
        """Back to the base model's behaviour, until the next `set`."""
        for branch in self._branches:
            branch.active = None

    def _check(self, deltas: Mapping[str, Tensor], gate: Tensor | None, rows: int) -> None:
        shapes = self.spec.tensors()
        for name in deltas:
            if name not in shapes:
                raise DeltaError(
                    f"The delta tensor {name!r} has no target",
                    "Expected the targets' own",
                    nearest(name, shapes),
                )
        for name, shape in shapes.items():
            if name not in deltas:
                raise DeltaError(f"The delta tensor {name!r} is missing", "Expected tensors for every target")
            tensor = deltas[name]
            if tensor.ndim != len(shape) + 1 or tuple(tensor.shape[1:]) != shape:
                expected = ", ".join(("D", *map(str, shape)))
                raise DeltaError(
                    f"The delta tensor {name!r} is {list(tensor.shape)}", f"Expected [{expected}]"
                )
            if not tensor.is_floating_point():
                raise DeltaError(f"The delta tensor {name!r} is {tensor.dtype}", "Expected floating point")
            first = deltas[next(iter(shapes))]
            if tensor.shape[0] != first.shape[0]:
                raise DeltaError(
                    f"The delta tensor {name!r} has delta batch {tensor.shape[0]}, not {first.shape[0]}",
                    "Expected the same for all tensors, 1 or the number of samples",
                )
        if gate is not None and gate.ndim != 1:
            raise DeltaError(f"The gate is {list(gate.shape)}", "Expected [B], one strength per sample")
        if rows < 1:
            raise DeltaError(f"Deltas were set for {rows} guidance rows", "Expected at least 1")


class _Active(NamedTuple):
    """One target's share of a `set`."""

    a: Tensor
    b: Tensor
    gate: Tensor | None
    rows: int


class _Branch(ABC):
    """The low-rank branch of one target, as a forward hook."""

    def __init__(self, target: DeltaTarget, module: nn.Module):
        self.target = target
        self.active: _Active | None = None
        self._module = module

    def attach(self) -> RemovableHandle:
        return self._module.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self.active is None:
            return None
        x: Tensor = args[0] if args else kwargs["input"]
        _, _, gate, rows = self.active
        self._check_batch(x.shape[0], self.active)
        batch = x.reshape(rows, x.shape[0] // rows, *x.shape[1:])
        a, b = self._matrices(args, self.active)
        gate = None if gate is None else gate.to(x.dtype)
        return self._add(output, batch, a.to(x.dtype), b.to(x.dtype), gate)

    def _add(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None) -> Tensor:
        """The target's ``output`` for ``x`` [rows, B, ...], with the delta."""
        low = self._down(x, a)
        if gate is not None:
            low = low * gate.reshape(-1, *[1] * (low.ndim - 2))
        return output + self._up(low, b).reshape(output.shape)

    def _matrices(self, args: tuple[Any, ...], active: _Active) -> tuple[Tensor, Tensor]:
        """A and B for what the module was called with."""
        return active.a, active.b

    def _check_batch(self, batch: int, active: _Active) -> None:
        if batch % active.rows:
            raise DeltaError(
                f"The module {self.target.module!r} ran with batch {batch}",
                f"Expected a multiple of the {active.rows} guidance rows",
            )
        samples = batch // active.rows
        if active.a.shape[0] != 1 and active.a.shape[0] != samples:
            raise DeltaError(
                f"The deltas of module {self.target.module!r} have delta batch {active.a.shape[0]}",
                f"Expected 1, or {samples} for the samples of this batch",
            )
        if active.gate is not None and active.gate.shape[0] != samples:
            raise DeltaError(
                f"The gate has {active.gate.shape[0]} entries", f"Expected {samples}, one per sample"
            )

    @abstractmethod
    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        """A applied to ``x`` [rows, B, ...]: the rank is one of the axes after the batch."""

    @abstractmethod
    def _up(self, low: Tensor, b: Tensor) -> Tensor:
        """``b`` [D, out, r], for experts [D, E, out, r], applied to what `_down` gave."""


class _LinearBranch(_Branch):
    """``[rows, B, ..., in]`` is viewed as ``[rows, B, L, in]``."""

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        return _tokens(x) @ a.transpose(1, 2)

    def _up(self, low: Tensor, b: Tensor) -> Tensor:
        return low @ b.transpose(1, 2)


class _MergedBranch(_LinearBranch):
    """One product with the changed weight, in the place of the base's, which no graph then computes.

    The weight depends on neither latents nor timestep, so that a step need not compute it again.
    """

    def _add(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None) -> Tensor:
        module = self._module
        assert isinstance(module, nn.Linear)
        delta = a.transpose(1, 2) @ b.transpose(1, 2)  # [D, in, out], as the product reads it
        if gate is not None:
            delta = delta * gate.reshape(-1, 1, 1)
        weight = module.weight.to(x.dtype).T + delta
        made = (_tokens(x) @ weight).reshape(output.shape)
        return made if module.bias is None else made + module.bias.to(x.dtype)


class _ConvBranch(_Branch):
    """``[rows, B, C, H, W]``, with A and B acting on the channels of ``[rows, B, C, H*W]``.

    A 1x1 kernel without stride needs no more than that. Otherwise A is applied tap by tap, giving r*k*k
    channels, and a constant grouped convolution brings every tap to its place and sums them. Only that one's
    weights are constant, so A may vary per sample, which it could not as the weight of a convolution.
    """

    def __init__(self, target: DeltaTarget, module: nn.Conv2d):
        super().__init__(target, module)
        self._stride = (module.stride[0], module.stride[1])
        self._dilation = (module.dilation[0], module.dilation[1])
        self._pads = _pads(module)
        self._pad_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        self._padding = (0, 0)
        self._pointwise = target.kernel == self._stride == (1, 1) and not any(self._pads)
        left, right, top, bottom = self._pads
        if self._pad_mode == "constant" and (left, top) == (right, bottom):
            self._pads, self._padding = [], (top, left)  # the grouped convolution can do it
        # taps[:, t, u, v] is 1 where tap t lies at (u, v). Made here, not while tracing, it is a constant of
        # the graph; a base without data lies on the meta device.
        device = module.weight.device if module.weight.device.type != "meta" else torch.device("cpu")
        kh, kw = target.kernel
        taps = torch.eye(kh * kw, dtype=module.weight.dtype, device=device)
        self._taps = taps.reshape(1, kh * kw, kh, kw).repeat(target.rank, 1, 1, 1)

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        if self._pointwise:
            return a.flatten(2) @ x.flatten(3)
        per_tap = a.flatten(3).transpose(2, 3).flatten(1, 2) @ x.flatten(3)  # [rows, B, r*kh*kw, H*W]
        per_tap = self._pad(per_tap.reshape(-1, per_tap.shape[2], *x.shape[3:]))
        taps = self._taps.to(device=x.device, dtype=x.dtype)
        low = F.conv2d(
            per_tap, taps, None, self._stride, self._padding, self._dilation, groups=self.target.rank
        )
        return low.reshape(*x.shape[:2], self.target.rank, -1)

    def _up(self, low: Tensor, b: Tensor) -> Tensor:
        return b @ low

    def _pad(self, x: Tensor) -> Tensor:
        """The base's padding of [N, C, H, W]; it treats every channel alike, so A may come before it."""
        return F.pad(x, self._pads, mode=self._pad_mode) if any(self._pads) else x


class _ExpertsBranch(_Branch):
    """``[rows, B, E or 1, n, in]``: every expert has its own A and B, as it has its own weight.

    Where blocks of rows have picked experts, ``[rows, B, blocks, n, in]``, each gets A and B of its own by a
    product with zeros and ones, which broadcasts over the sets of deltas as the other products do.
    """

    def _matrices(self, args: tuple[Any, ...], active: _Active) -> tuple[Tensor, Tensor]:
        picked = args[2] if len(args) > 2 else None
        if picked is None:
            return active.a, active.b
        hit = picked.hit.reshape(active.rows, picked.hit.shape[0] // active.rows, *picked.hit.shape[1:])
        a, b = (
            (hit @ tensor.to(hit.dtype).flatten(2)).unflatten(-1, tensor.shape[2:])
            for tensor in (active.a, active.b)
        )
        return a, b

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        return x @ a.transpose(-2, -1)

    def _up(self, low: Tensor, b: Tensor) -> Tensor:
        return low @ b.transpose(-2, -1)


def _tokens(x: Tensor) -> Tensor:
    """``[rows, B, ..., in]`` as ``[rows, B, L, in]``."""
    return x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, -2)


def _pads(module: nn.Conv2d) -> list[int]:
    """Left, right, top and bottom padding; for "same" torch puts the odd pixel at the end."""
    pads: list[int] = []
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0 if isinstance(module.padding, str) else module.padding[axis]] * 2
    return pads


def _branch(target: DeltaTarget, module: nn.Module) -> _Branch:
    if isinstance(module, nn.Conv2d):
        return _ConvBranch(target, module)
    if isinstance(module, ExpertLinear):
        return _ExpertsBranch(target, module)
    return (_MergedBranch if target.merged else _LinearBranch)(target, module)
