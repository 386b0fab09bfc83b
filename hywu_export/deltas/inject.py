"""Deltas in a torch module, by forward hooks: ``y = f(x) + gate * (x A^T) B^T`` for every target, per sample.

The form is made for tracing: plain broadcasting products, and for k x k convolutions one constant grouped convolution, so that
deltas stay inputs of the graph and may differ from sample to sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hywu_export.deltas.modules import resolve
from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, nearest
from hywu_runtime.errors import DeltaError


def inject(module: nn.Module, spec: DeltaSpec) -> Injection:
    """Prepare ``module`` to take the deltas of ``spec``; parameters and state-dict keys stay as they are.

    Use it as a context manager; the hooks exist only inside::

        with inject(unet, spec) as injection:
            injection.set(deltas, gate)
            unet(x)

    Raises `CheckpointError` if a target is missing in ``module`` or has other dimensions, and `UnsupportedError` if it is of a type
    that takes no deltas.
    """
    return Injection(module, spec)


class Injection:
    """Deltas at work in one module tree; see `inject`. Until `set` is called the base model runs unchanged."""

    def __init__(self, module: nn.Module, spec: DeltaSpec):
        self.spec = spec
        self._branches = [
            _branch(target, found) for target, found in zip(spec.targets, resolve(module, spec).values())
        ]
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

        ``deltas``: every tensor of ``spec.tensors()``, with a leading axis D that is 1 or B, floating point. They are cast to the
        activations' dtype. ``gate``: [B], multiplies the delta of each sample; at 0 the base's result is exact. ``rows``: guidance rows;
        activations have batch rows*B in the order [row 0 of all samples, row 1 of all samples, ...], and every row gets the same
        deltas and gate.

        Raises `DeltaError` naming the tensor that is missing, extra or mis-shaped. A D or gate that does not fit the batch is found
        by the forward, which then raises `DeltaError`.
        """
        shapes = self.spec.tensors()
        for name in deltas:
            if name not in shapes:
                raise DeltaError(f"Delta tensor {name!r} has no target", "", nearest(name, shapes))
        first: Tensor | None = None
        for name, shape in shapes.items():
            if name not in deltas:
                raise DeltaError(
                    f"Delta tensor {name!r} is missing", "A set of deltas is complete for every target"
                )
            tensor = deltas[name]
            first = tensor if first is None else first
            if tuple(tensor.shape[1:]) != shape or tensor.ndim == 0:
                expected = ", ".join(("D", *map(str, shape)))
                raise DeltaError(
                    f"Delta tensor {name!r} has shape {list(tensor.shape)}", f"Expected [{expected}]"
                )
            if tensor.shape[0] != first.shape[0]:
                raise DeltaError(
                    f"Delta tensor {name!r} has delta batch {tensor.shape[0]}, others have {first.shape[0]}",
                    "All tensors of a set have the same delta batch, 1 or the number of samples",
                )
            if not tensor.is_floating_point():
                raise DeltaError(
                    f"Delta tensor {name!r} has dtype {tensor.dtype}", "Expected a floating-point dtype"
                )
        if gate is not None and gate.ndim != 1:
            raise DeltaError(
                f"The delta gate has shape {list(gate.shape)}", "Expected [B], one strength per sample"
            )
        if rows < 1:
            raise DeltaError(f"Deltas were set for {rows} guidance rows", "Expected at least 1")
        for branch in self._branches:
            branch.set(deltas[branch.target.a_name], deltas[branch.target.b_name], gate, rows)

    def clear(self) -> None:
        """Back to the base model's behaviour, until the next `set`."""
        for branch in self._branches:
            branch.clear()


class _Branch:
    """The low-rank branch of one target, as a forward hook."""

    def __init__(self, target: DeltaTarget, module: nn.Module):
        self.target = target
        self.module = module
        self.clear()

    def attach(self) -> RemovableHandle:
        return self.module.register_forward_hook(self._hook, with_kwargs=True)

    def set(self, a: Tensor, b: Tensor, gate: Tensor | None, rows: int) -> None:
        self._a, self._b, self._gate, self._rows = a, b, gate, rows

    def clear(self) -> None:
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self._gate: Tensor | None = None
        self._rows = 1

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._a is None or self._b is None:
            return None
        x: Tensor = args[0] if args else kwargs["input"]
        self._check_batch(x, self._a)
        gate = None if self._gate is None else self._gate.to(x.dtype).reshape(-1, 1, 1)
        return output + self._delta(x, self._a.to(x.dtype), self._b.to(x.dtype), gate, output)

    def _check_batch(self, x: Tensor, a: Tensor) -> None:
        name = self.target.module
        if x.shape[0] % self._rows:
            raise DeltaError(
                f"Module {name!r} ran with batch {x.shape[0]}",
                f"Expected a multiple of the {self._rows} guidance rows",
            )
        samples = x.shape[0] // self._rows
        if a.shape[0] != 1 and a.shape[0] != samples:
            raise DeltaError(
                f"The deltas of module {name!r} have delta batch {a.shape[0]}",
                f"Expected 1 or {samples}, the samples",
            )
        if self._gate is not None and self._gate.shape[0] != samples:
            raise DeltaError(
                f"The delta gate has {self._gate.shape[0]} entries", f"Expected {samples}, one per sample"
            )

    def _delta(self, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, output: Tensor) -> Tensor:
        """The gated delta in the shape of ``output``; ``a`` and ``b`` in x's dtype, ``gate`` None or [B, 1, 1]."""
        raise NotImplementedError

    def _split_rows(self, x: Tensor) -> Tensor:
        """[rows*B, ...] as [rows, B, ...]."""
        return x.unflatten(0, (self._rows, -1))


class _LinearBranch(_Branch):
    def _delta(self, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, output: Tensor) -> Tensor:
        tokens = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        low = self._split_rows(tokens) @ a.transpose(1, 2)  # [rows, B, L, r]
        if gate is not None:
            low = low * gate
        return (low @ b.transpose(1, 2)).reshape(output.shape)


class _ConvBranch(_Branch):
    """Convolutions, as products over the channels of ``[rows, B, C, H*W]``.

    A 1x1 kernel needs no more than that. For a k x k kernel, A is applied per tap, giving r*k*k channels, and a constant grouped
    convolution shifts every tap to its place and sums them: only its weights are constant, so that A may vary per sample.
    """

    module: nn.Conv2d

    def __init__(self, target: DeltaTarget, module: nn.Conv2d):
        super().__init__(target, module)
        kh, kw = target.kernel
        # weight[i, t, u, v] = 1 where tap t lies at (u, v). Made here, and not while tracing, to become a plain constant.
        taps = torch.eye(kh * kw, dtype=module.weight.dtype, device=module.weight.device)
        self._taps = taps.reshape(kh * kw, kh, kw).repeat(target.rank, 1, 1, 1)

    def _delta(self, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, output: Tensor) -> Tensor:
        pointwise = self.target.kernel == (1, 1)
        if pointwise:
            x = self._pad(x)[:, :, :: self._stride[0], :: self._stride[1]]
            low = self._channels(x, a.flatten(2))
        else:
            low = self._channels(x, a.flatten(3).transpose(2, 3).flatten(1, 2))  # [rows, B, r*kh*kw, H*W]
            low = self._pad(low.reshape(x.shape[0], -1, *x.shape[2:]))
            taps = self._taps.to(device=x.device, dtype=x.dtype)
            low = F.conv2d(low, taps, stride=self._stride, dilation=self._dilation, groups=self.target.rank)
            low = self._split_rows(low.flatten(2))
        if gate is not None:
            low = low * gate
        return (b @ low).reshape(output.shape)

    def _channels(self, x: Tensor, weight: Tensor) -> Tensor:
        """``weight`` [D, c, C] applied to the channels of ``x`` [rows*B, C, H, W], as [rows, B, c, H*W]."""
        return weight @ self._split_rows(x.flatten(2))

    @property
    def _stride(self) -> tuple[int, int]:
        return (self.module.stride[0], self.module.stride[1])

    @property
    def _dilation(self) -> tuple[int, int]:
        return (self.module.dilation[0], self.module.dilation[1])

    def _pad(self, x: Tensor) -> Tensor:
        """``x`` with the module's own padding, which every channel gets alike and which thus commutes with A."""
        pads = self._pads()
        if not any(pads):
            return x
        mode = self.module.padding_mode
        return F.pad(x, pads, mode="constant" if mode == "zeros" else mode)

    def _pads(self) -> list[int]:
        """Left, right, top, bottom. 'same' puts the odd pixel at the end, as torch does."""
        padding = self.module.padding
        pads: list[int] = []
        for axis in (1, 0):
            if padding == "valid":
                pads += [0, 0]
            elif padding == "same":
                total = self._dilation[axis] * (self.target.kernel[axis] - 1)
                pads += [total // 2, total - total // 2]
            else:
                pads += [int(padding[axis])] * 2
        return pads


def _branch(target: DeltaTarget, module: nn.Module) -> _Branch:
    if isinstance(module, nn.Conv2d):
        return _ConvBranch(target, module)
    return _LinearBranch(target, module)
