"""The scale of a LoRA where a configuration gives it, by PEFT's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hywu_runtime.errors import CheckpointError, UnsupportedError

# Settings of peft.LoraConfig that the adapter's result does not depend on, or that are handled below. Any
# other one that is set would be a feature that is unknown here, and ignoring it would give wrong images.
# `fan_in_fan_out` concerns merging into a transposed weight only: A and B have the same form with it.
_KNOWN_SETTINGS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform
    lora_alpha lora_dropout megatron_config megatron_core peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules task_type use_rslora velora_config
    """.split()  # noqa: SIM905
)
# The others (pissa, olora, corda, loftq, ...) also change the base's weights, which the adapter then relies
# on.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class ConfiguredScale:
    """The factor of every module's B · A in an adapter with the LoRA configuration ``config``.

    Raises:
        CheckpointError: the configuration is malformed.
        UnsupportedError: it asks for more than LoRA.
    """

    def __init__(self, config: Mapping[str, Any], source: Path):
        self.source = source
        self.config = config
        self._refuse_unsupported()
        number = (int, float)
        self.rank = self._value("r", None, int, lambda value: value > 0)
        self.alpha = self._value("lora_alpha", None, number, math.isfinite)
        self.ranks = self._pattern("rank_pattern", int, lambda value: value > 0)
        self.alphas = self._pattern("alpha_pattern", number, math.isfinite)

    def __call__(self, module: str, rank: int) -> float:
        """The factor of ``module``, whose A has ``rank``: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        expected = self._lookup(self.ranks, module, self.rank)
        if rank != expected:
            raise CheckpointError(
                f"{self.source}: the LoRA of module {module!r} has rank {rank}",
                f"Expected {expected} by its settings",
            )
        alpha: float = self._lookup(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @staticmethod
    def _lookup(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
        return next((value for pattern, value in patterns.items() if pattern.match(module)), default)

    def _refuse_unsupported(self) -> None:
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA":
            raise self._unsupported(f"is of type {kind!r}")
        init = self.config.get("init_lora_weights")
        if not isinstance(init, bool) and init not in _PLAIN_INITS:
            raise self._unsupported(
                f"was initialised with {init!r}, which changes the base's weights as well"
            )
        if self.config.get("bias", "none") != "none":
            raise self._unsupported(f"trained biases (bias = {self.config['bias']!r})")
        for name in sorted(self.config.keys() - _KNOWN_SETTINGS):
            if self.config[name]:
                raise self._unsupported(f"uses {name} = {self.config[name]!r}")

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"The adapter {self.source} {what}",
            "Only plain LoRA is supported",
            "Merge it into the base and export that, or retrain it as plain LoRA",
        )

    def _value(
        self, name: str, value: Any, kind: type | tuple[type, ...], valid: Callable[[Any], bool]
    ) -> Any:
        """``value``, or the setting ``name`` if None, checked to be a ``valid`` number of ``kind``."""
        value = self.config.get(name) if value is None else value
        if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
            raise CheckpointError(
                f"{self.source}: the adapter's {name} is {value!r}", "Expected a usable number"
            )
        return value

    def _pattern(
        self, name: str, kind: type | tuple[type, ...], valid: Callable[[Any], bool]
    ) -> dict[re.Pattern[str], Any]:
        """A ``*_pattern`` setting, whose keys are regular expressions for the last parts of a module path."""
        entries = self.config.get(name) or {}
        if not isinstance(entries, Mapping):
            raise CheckpointError(f"{self.source}: the adapter's {name} is {entries!r}", "Expected an object")
        patterns = {}
        for key, value in entries.items():
            try:
                pattern = re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise CheckpointError(
                    f"{self.source}: {key!r} in the adapter's {name} is no pattern: {error}"
                ) from error
            patterns[pattern] = self._value(f"{name}[{key!r}]", value, kind, valid)
        return patterns
