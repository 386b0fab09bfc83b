"""The parameter generator, beside PyTorch and beside its own graph without what is computed at export.

The sizes: d_model 1024, 8 blocks, 16 base layers, the mapping of the released generator with 8 experts, a
condition of 1024 tokens, float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, WIDTH = 1024, 1024


@dataclass(frozen=True)
class GeneratorSubject:
    """The checkpoint, its bundle, and its bundle without constants; threads of every peer."""

    folder: Path
    bundle: Path
    plain: Path
    threads: int

    def condition(self, number: int) -> Any:
        """Float32 ``[1, LENGTH, WIDTH]``."""
        return np.random.default_rng(number).standard_normal((1, LENGTH, WIDTH)).astype(np.float32)


def make_generator(out: Path, threads: int) -> GeneratorSubject:
    """The subject, made in ``out`` if it is not there: random weights."""
    import copy
    from unittest import mock

    from hywu_export import ExportOptions, export
    from hywu_export.families import generator as part
    from hywu_export.generator import GeneratorConfig, ParameterGenerator
    from tools.sparse_checkpoints import GENERATOR

    subject = GeneratorSubject(out / "checkpoint", out / "bundle", out / "plain", threads)
    if not (subject.folder / "config.json").exists():
        import torch

        settings = copy.deepcopy(GENERATOR) | {
            "d_model": WIDTH, "input_dim": WIDTH, "num_pg_layers": 8, "num_base_model_layers": 16,
        }  # fmt: skip
        settings["pg_mapping"]["mlp.experts"]["num_experts"] = 8
        torch.manual_seed(0)
        module = ParameterGenerator(GeneratorConfig.from_dict(settings))
        torch.nn.init.normal_(module.model.proj_out_B.weight, std=0.02)
        module.save_pretrained(subject.folder)
    for folder, most in ((subject.bundle, part.FOLD_BYTES), (subject.plain, 0)):
        if not (folder / "manifest.json").exists():
            with mock.patch.object(part, "FOLD_BYTES", most):
                export(folder, generator=subject.folder, options=ExportOptions(max_batch=2))
    return subject


class Exported:
    """The bundle in the runtime."""

    picture = None

    def __init__(self, subject: GeneratorSubject, plain: bool = False):
        from hywu_runtime import Editor

        self.editor = Editor.load(
            subject.plain if plain else subject.bundle, "ort-cpu", threads=subject.threads
        )
        self.conditions = [subject.condition(number) for number in range(2)]

    def edit(self, number: int) -> dict[str, float]:
        start = time.perf_counter()
        self.editor.generate(inputs={"condition": self.conditions[number]})
        return {"edit": time.perf_counter() - start}


class Eager:
    """The module in PyTorch."""

    picture = None

    def __init__(self, subject: GeneratorSubject):
        import torch

        from hywu_export.generator import ParameterGenerator

        torch.set_num_threads(subject.threads)
        self.torch, self.module = torch, ParameterGenerator.from_pretrained(subject.folder).eval()
        self.conditions = [torch.from_numpy(subject.condition(number)) for number in range(2)]

    def edit(self, number: int) -> dict[str, float]:
        start = time.perf_counter()
        with self.torch.no_grad():
            self.module.deltas(self.conditions[number])
        return {"edit": time.perf_counter() - start}
