"""Prompts to token ids, with Hugging Face ``tokenizers`` files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hywu_runtime.codec import show
from hywu_runtime.errors import BundleError, InputError
from hywu_runtime.manifest import Tokenizer

MAX_CHARACTERS = 1_000_000
_log = logging.getLogger(__name__)


class PromptEncoder:
    """Encodes texts to a fixed length, as the manifest's tokenizer entry says.

    Raises:
        BundleError: the tokenizer file cannot be used.
    """

    def __init__(self, path: Path, entry: Tokenizer):
        import tokenizers

        self.entry = entry
        steps = [tokenizers.normalizers.Strip(), tokenizers.normalizers.Lowercase()]
        self._lower = tokenizers.normalizers.Sequence(steps).normalize_str if entry.lowercase else _as_it_is
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.enable_padding(
                direction=entry.pad_side, pad_id=entry.pad_id, length=entry.max_length
            )
            if entry.truncate:
                self._tokenizer.enable_truncation(entry.max_length)
            else:
                self._tokenizer.no_truncation()
        except Exception as error:  # the library raises plain Exception
            raise BundleError(
                f"{path.name} is not a usable tokenizer: {error}",
                "Expected a Hugging Face `tokenizers` file",
                "Copy or export the bundle again",
            ) from None

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids and attention mask, both int64 ``[len(texts), max_length]``; cutting a text is warned of.

        Each text is put into the entry's template first, if the entry says so stripped and in lower case.

        Raises:
            InputError: a text is not a string of valid Unicode, is absurdly long, or too long where the
                bundle does not cut.
        """
        for text in texts:
            check_text(text)
        before, _, after = self.entry.template.partition("{}")
        whole = [f"{before}{self._lower(text)}{after}" for text in texts]
        encodings = self._tokenizer.encode_batch(whole)
        for text, encoding in zip(texts, encodings):
            if len(encoding.ids) != self.entry.max_length:
                raise InputError(
                    f"The prompt {show(text)} has {len(encoding.ids)} tokens",
                    f"This bundle takes {self.entry.max_length}",
                    "Shorten it",
                )
            if encoding.overflowing:
                _log.warning(
                    "the prompt %s is longer than %d tokens and was cut", show(text), self.entry.max_length
                )
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        return ids, mask


def _as_it_is(text: str) -> str:
    return text


def check_text(text: object) -> None:
    """Raises InputError unless ``text`` is a string of valid Unicode and sane length."""
    if not isinstance(text, str):
        raise InputError(f"The prompt is {show(text)}", "Expected a string", "Decode bytes as UTF-8 first")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"The prompt has {len(text)} characters", f"Expected at most {MAX_CHARACTERS}", "Shorten it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"The prompt {show(text)} is not valid Unicode",
            "Expected text without lone surrogates",
            "Decode it from its real encoding",
        ) from None
