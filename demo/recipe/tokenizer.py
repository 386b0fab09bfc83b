"""The demo's tokenizer: CLIP's byte-level BPE with merges learnt from the demo's own phrasings.

Any text can be encoded (all 256 bytes are in the vocabulary); the instructions' words are single tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

MAX_LENGTH = 32


def train_tokenizer(texts: Iterable[str], out: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the configuration that ``CLIPTokenizer`` loads."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(sorted(texts), trainer)

    import json

    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH).save_pretrained(out)
