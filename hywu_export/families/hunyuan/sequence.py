"""The token sequence of an edit in the instruct template: what is text, what is picture, and where.

::

    prefix          <bos> system "\\n\\n" "User: " <boi> <img_size> <img_ratio> <timestep>
    VAE tokens      one for each latent of the photo
    bridge          <joint_img_sep>, ViT tokens, <eoi>
    suffix          prompt "\\n\\n" "Assistant: " thoughts <answer> <boi> <img_size>
                    <img_ratio> <timestep> picture

Only the suffix differs from request to request. It is put together in a graph from the ids of one text: the
prompt, and directly behind it the thoughts that the model wrote about it, if there are any. They begin with
``<think>`` or ``<recaption>``, which is where the role of the assistant is put in. The suffix has a fixed
number of places, and what is left over is padding at its end, which no token that counts can see.

The picture that is made follows the last token that counts. It is not part of the sequence that the condition
is made of, and neither is its ``<img_ratio>``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hywu_export.families.components import read_config
from hywu_runtime.errors import CheckpointError

SEPARATOR = "\n\n"
# Heights and widths that were added to the buckets of the base size later, for base size 1024.
_EXTRA_BUCKETS = ((1024, 768), (1280, 720), (768, 1024), (720, 1280))


@dataclass(frozen=True)
class Tokens:
    """Token ids of everything that is not the request's."""

    prefix: tuple[int, ...]  # up to the first <boi>
    assistant: tuple[int, ...]  # between prompt and thoughts
    answer: tuple[int, ...]  # before the picture's <boi>
    boi: int
    eoi: int
    size: int
    ratios: tuple[int, ...]
    separator: int  # <joint_img_sep>
    cfg: int
    pad: int
    thoughts: tuple[int, ...]  # ids that thoughts begin with

    @property
    def tail(self) -> tuple[int, ...]:
        """What ends the suffix."""
        return (*self.answer, self.boi, self.size)

    @property
    def added(self) -> int:
        """Tokens of the suffix that are not the request's."""
        return len(self.assistant) + len(self.tail)


def read_tokens(folder: Path, base_size: int) -> Tokens:
    """The ids that the tokenizer in ``folder`` gives, with the system prompt of the checkpoint.

    Raises:
        CheckpointError: there is no tokenizer, or it lacks a token of the template.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(
            f"The tokenizer {path} cannot be read ({error})", "A tokenizer.json", "Fetch the checkpoint whole"
        ) from error

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    def special(*names: str) -> int:
        found = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
        if found is None:
            raise CheckpointError(
                f"The tokenizer in {folder} has no token {names[0]}",
                "The instruct template needs it",
                "Use the tokenizer of HunyuanImage-3.0-Instruct",
            )
        return int(found)

    config = read_config(folder / "config.json")
    bos = config.get("bos_token_id")
    start = (bos,) if isinstance(bos, int) else (special("<|startoftext|>"),)
    system = system_prompt(folder)
    said = (*encode(system), *encode(SEPARATOR)) if system else ()
    pad = config.get("pad_token_id")
    return Tokens(
        prefix=(*start, *said, *encode("User: ")),
        assistant=(*encode(SEPARATOR), *encode("Assistant: ")),
        answer=(special("<answer>"),),
        boi=special("<boi>"),
        eoi=special("<eoi>"),
        size=special(f"<img_size_{base_size}>"),
        ratios=tuple(special(f"<img_ratio_{i}>") for i in range(len(buckets(base_size)))),
        separator=special("<joint_img_sep>"),
        cfg=special("<cfg>"),
        pad=pad if isinstance(pad, int) and pad >= 0 else special("<pad>", "<cfg>"),
        thoughts=(special("<think>"), special("<recaption>")),
    )


def system_prompt(folder: Path) -> str:
    """The system prompt that ``generation_config.json`` names (``en_unified``), stripped; empty for none.

    Checkpoints bring the texts as string constants in ``system_prompt.py``. The file is read, not run.

    Raises:
        CheckpointError: the text that is named is not there.
    """
    settings = folder / "generation_config.json"
    named = read_config(settings).get("use_system_prompt") if settings.exists() else None
    if not isinstance(named, str) or named.lower() == "none":
        return ""
    words = set(named.lower().split("_"))
    path = folder / "system_prompt.py"
    texts: dict[str, str] = {}
    if path.exists():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error})", "String constants in Python", "Fetch it again"
            ) from error
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                        texts[target.id] = node.value.value
    fitting = [text for name, text in texts.items() if words <= set(name.lower().split("_"))]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{len(fitting)} texts of {path} are the system prompt {named!r}",
            "One string constant with these words in its name",
            "Fetch system_prompt.py with the checkpoint, or set use_system_prompt to none",
        )
    return fitting[0].strip()


def buckets(base_size: int) -> list[tuple[int, int]]:
    """(height, width) of the pictures that the model makes, in the order of the ``<img_ratio>`` tokens."""
    step, align = base_size // 16, 16
    low, high = base_size // 2, base_size * 2
    sizes = {(base_size, base_size)}
    for count in range(1, base_size // step + 1):
        longer, shorter = min(base_size + count * step, high), max(base_size - count * step, low)
        sizes |= {(longer, shorter), (shorter, longer)}
    extra = [(h * base_size // 1024, w * base_size // 1024) for h, w in _EXTRA_BUCKETS]
    ordered = sorted(sizes, key=lambda size: size[0] / size[1]) + extra
    return [(h // align * align or align, w // align * align or align) for h, w in ordered]


def ratio_token(tokens: Tokens, base_size: int, height: int, width: int) -> Tensor:
    """The ``<img_ratio>`` of a picture, int64 ``[1]``: the bucket with the nearest height / width."""
    known = torch.tensor([h / w for h, w in buckets(base_size)], dtype=torch.float32)
    distance = (known - _size(height) / _size(width)).abs()
    chosen = torch.argmax(-distance.unsqueeze(0), dim=1)  # TensorRT asks for two axes
    return lookup(tokens.ratios, chosen)


def lookup(table: Sequence[int], index: Tensor) -> Tensor:
    """``table[index]``, as a Gather."""
    rows = torch.tensor(tuple(table)).unsqueeze(1)
    return torch.nn.functional.embedding(index, rows).squeeze(-1)


def _size(length: int) -> Tensor:
    """A size of the graph as a float32 value ``[1]``."""
    return torch.arange(length)[-1:].to(torch.float32) + 1.0


class Suffix(nn.Module):
    """Ids and mask ``[B, length]`` of a request's text, padded on the right, to those of the suffix.

    Returns ids, ids of the unconditional row (prompt and thoughts are ``<cfg>``, one for one), and the mask,
    int64 ``[B, length + tokens.added]`` each.
    """

    def __init__(self, tokens: Tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length, tokens = ids.shape[1], self.tokens
        place = torch.arange(length)
        count = mask.sum(1, keepdim=True)
        thought = (ids.unsqueeze(-1) == torch.tensor(tokens.thoughts)).to(torch.int64).sum(-1) > 0
        left = torch.where(thought, length - place, torch.zeros_like(ids))
        begun = length - left.amax(1, keepdim=True)  # the place of the first, or the end
        prompt = torch.minimum(begun, count)

        place = torch.arange(length + tokens.added)
        role, tail = len(tokens.assistant), len(tokens.tail)
        first = torch.nn.functional.pad(ids, (0, tokens.added))
        second = torch.nn.functional.pad(ids, (role, tokens.added - role))
        said = torch.where(place < prompt, first, second)
        text = _place(said, place, prompt, tokens.assistant)
        unconditional = _place(torch.full_like(said, tokens.cfg), place, prompt, tokens.assistant)
        end = count + role
        outputs = [_place(x, place, end, tokens.tail) for x in (text, unconditional)]
        within = place < end + tail
        pad = torch.full_like(said, tokens.pad)
        return (
            torch.where(within, outputs[0], pad),
            torch.where(within, outputs[1], pad),
            within.to(torch.int64),
        )


def _place(x: Tensor, place: Tensor, start: Tensor, ids: Sequence[int]) -> Tensor:
    """``x`` ``[B, n]`` with ``ids`` from ``start`` ``[B, 1]`` on."""
    offset = place - start
    known = lookup(ids, offset.clamp(0, len(ids) - 1))
    return torch.where((offset >= 0) & (offset < len(ids)), known, x)
