"""The configuration of a parameter generator, as its ``config.json`` states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # values come from files, and may be of any size
from typing import Any

from hywu_export.bundle.sources import read_json_object
from hywu_runtime.errors import CheckpointError

MODEL_TYPE = "parameter_generator"

# What libraries write into every config.json, besides keys with a leading underscore. It says nothing about
# the network; any other key might, so that is refused.
_IGNORED_KEYS = {
    *("architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder"),
    *("label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
    *("tie_word_embeddings", "torch_dtype", "torchscript", "transformers_version", "use_cache"),
}

# Far above any real network, so that a hostile file is refused before it costs time or memory.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 10


@dataclass(frozen=True)
class PlainTarget:
    """A Linear of every base layer: A is ``[rank, in_features]``, B is ``[out_features, rank]``."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class GroupedTarget:
    """Expert weights of every base layer: each of ``weights`` gets one A and one B per expert.

    A is ``[num_experts, rank, in_features]``, B is ``[num_experts, out_features, rank]``.
    """

    num_experts: int
    weights: Mapping[str, PlainTarget]


Target = PlainTarget | GroupedTarget


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a parameter generator and the modules it makes deltas for.

    ``pg_mapping`` is in the order of ``config.json``. That order decides which tokens make which delta, so
    nothing here ever sorts it.
    """

    token_dim: int
    rank: int
    alpha: float
    input_dim: int
    dim_accumulation: int
    d_model: int
    head_dim: int
    num_base_model_layers: int
    output_dim: int
    num_pg_layers: int
    prefix: str
    pg_mapping: Mapping[str, Target]

    @property
    def num_heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def scale(self) -> float:
        """What a delta's product B·A is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def from_file(cls, path: str | Path) -> GeneratorConfig:
        """Read ``config.json``.

        Raises:
            CheckpointError: the file is missing, not JSON, has a key twice, or is not a valid configuration.
        """
        return cls.from_dict(read_json_object(path), source=str(path))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], source: str = "the generator's configuration"
    ) -> GeneratorConfig:
        """Check ``data`` and make a configuration of it; ``source`` names it in messages.

        Raises:
            CheckpointError: a field is missing, unknown, mistyped, or the fields contradict each other.
        """
        return _Reader(source).config(data)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``: keys sorted as in released files, targets in their own order."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["pg_mapping"] = {name: _target_to_dict(target) for name, target in self.pg_mapping.items()}
        data |= {"architectures": ["ParameterGenerator"], "model_type": MODEL_TYPE}
        return dict(sorted(data.items()))


def _target_to_dict(target: Target) -> dict[str, Any]:
    if isinstance(target, PlainTarget):
        return {"lora_A_dim": target.in_features, "lora_B_dim": target.out_features}
    weights = {name: _target_to_dict(weight) for name, weight in target.weights.items()}
    return {"type": "grouped", "num_experts": target.num_experts, "sub_weights": weights}


class _Reader:
    """Checks a raw configuration; all its messages name the source and the field."""

    def __init__(self, source: str):
        self.source = source

    def config(self, data: Mapping[str, Any]) -> GeneratorConfig:
        if data.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise self._error(f"model_type is {brief(data['model_type'])}", f"{MODEL_TYPE!r}")
        ignored = _IGNORED_KEYS | {"model_type"}
        fields = {key: value for key, value in data.items() if key not in ignored and not key.startswith("_")}
        self._keys("the configuration", fields, set(GeneratorConfig.__dataclass_fields__))
        for name in fields.keys() - {"alpha", "prefix", "pg_mapping"}:
            self._positive_int(name, fields[name], _MAX_LAYERS if name.endswith("_layers") else _MAX_SIZE)
        alpha, prefix, mapping = fields["alpha"], fields["prefix"], fields["pg_mapping"]
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= _MAX_SIZE:
            raise self._error(f"alpha is {brief(alpha)}", f"a positive number up to {_MAX_SIZE}")
        if not isinstance(prefix, str) or not prefix.isprintable():
            raise self._error(f"prefix is {brief(prefix)}", "the beginning of module names")
        config = GeneratorConfig(**{**fields, "pg_mapping": self._mapping(mapping)})
        self._relations(config)
        return config

    def _relations(self, config: GeneratorConfig) -> None:
        for dividend, divisor in (
            ("d_model", "head_dim"),
            ("d_model", "dim_accumulation"),
            ("rank", "dim_accumulation"),
        ):
            if getattr(config, dividend) % getattr(config, divisor):
                raise self._error(
                    f"{dividend} is {getattr(config, dividend)} and {divisor} is {getattr(config, divisor)}",
                    f"{dividend} to be a multiple of {divisor}",
                )
        if config.head_dim % 4:
            raise self._error(
                f"head_dim is {config.head_dim}", "a multiple of 4, for two rotary axes of pairs"
            )
        if config.output_dim != config.token_dim:
            raise self._error(
                f"output_dim is {config.output_dim} and token_dim is {config.token_dim}", "both to be equal"
            )

    def _mapping(self, data: Any) -> dict[str, Target]:
        mapping: dict[str, Target] = {}
        for name, entry in self._named_objects("pg_mapping", data):
            where = f"pg_mapping[{name!r}]"
            mapping[name] = self._grouped(where, entry) if "type" in entry else self._plain(where, entry)
        seen: set[str] = set()
        for name, *_ in expand(mapping):
            if name in seen:
                raise self._error(f"pg_mapping names {name!r} twice", "every target once")
            seen.add(name)
        return mapping

    def _plain(self, where: str, entry: Mapping[str, Any]) -> PlainTarget:
        self._keys(where, entry, {"lora_A_dim", "lora_B_dim"})
        sizes = (self._positive_int(f"{where}.{key}", entry[key]) for key in ("lora_A_dim", "lora_B_dim"))
        return PlainTarget(*sizes)

    def _grouped(self, where: str, entry: Mapping[str, Any]) -> GroupedTarget:
        if entry["type"] != "grouped":
            raise self._error(
                f"{where}.type is {brief(entry['type'])}", "'grouped', or no type for a plain target"
            )
        self._keys(where, entry, {"type", "num_experts", "sub_weights"})
        experts = self._positive_int(f"{where}.num_experts", entry["num_experts"])
        weights = self._named_objects(f"{where}.sub_weights", entry["sub_weights"])
        return GroupedTarget(
            experts, {name: self._plain(f"{where}.sub_weights[{name!r}]", weight) for name, weight in weights}
        )

    def _named_objects(self, where: str, data: Any) -> list[tuple[str, Mapping[str, Any]]]:
        if not isinstance(data, Mapping) or not data:
            raise self._error(f"{where} is {brief(data)}", "an object with at least one entry")
        for name, entry in data.items():
            if not isinstance(name, str) or not name or not name.isprintable():
                raise self._error(f"{where} has the name {name!r}", "module names")
            if not isinstance(entry, Mapping):
                raise self._error(f"{where}[{name!r}] is {brief(entry)}", "an object")
        return list(data.items())

    def _keys(self, where: str, data: Mapping[str, Any], expected: set[str]) -> None:
        if missing := expected - data.keys():
            raise self._error(f"{where} lacks {_listed(missing)}", f"the keys {_listed(expected)}")
        if extra := data.keys() - expected:
            raise self._error(
                f"{where} has the unknown key {_listed(extra)}", f"the keys {_listed(expected)}"
            )

    def _positive_int(self, where: str, value: Any, maximum: int = _MAX_SIZE) -> int:
        if type(value) is not int or not 0 < value <= maximum:
            raise self._error(f"{where} is {brief(value)}", f"a positive integer up to {maximum}")
        return value

    def _error(self, wrong: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: {wrong}", expected, "check that this is the config.json of a parameter generator"
        )


def expand(mapping: Mapping[str, Target]) -> list[tuple[str, PlainTarget, int | None]]:
    """Entries (name, sizes, number of experts or None) in mapping order, groups replaced by their weights."""
    entries: list[tuple[str, PlainTarget, int | None]] = []
    for name, target in mapping.items():
        if isinstance(target, PlainTarget):
            entries.append((name, target, None))
        else:
            entries += [
                (f"{name}.{sub}", weight, target.num_experts) for sub, weight in target.weights.items()
            ]
    return entries


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(map(str, names)))
