"""Texts in many scripts, and tokenizers of every kind trained on them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).resolve().parents[2]
SPACES = (
    "\t\n\v\f\r \x1c\x85\xa0\u1680\u180e\u2000\u2003\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
WORDS = {
    "emoji": "😀 👍 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵🇺🇸 ❤️ ☀︎ 1️⃣ 🧑🏿‍🚀 🫨 🪿 \U0001fae9",
    "english": """make the photo look like an old painting with warm light and soft shadows it's don't we'll
        they've I'd can't turn day into night remove every person from background add snow Sepia BLACK White
        blur sharpen 1920s film-noir café naïve résumé straße İstanbul ﬁne ﬀoo Ångström Ｆｕｌｌ ⅷ ½ m² H₂O
        ½cup ŒUVRE ǅ ẞ ΣΊΣΥΦΟΣ Привет МИР κόσμε""",
    "special": """<|startoftext|> <|endoftext|> <|im_start|> </s> <unk> <pad> <mask> ▁ <0x41> <extra_id_0>
        yesterday <tool_call> Night photo photos 照片""",
}
EMOJI, ENGLISH, SPECIAL = (words.split() for words in WORDS.values())
SPECIAL += [" <mask>  <pad> ", "Night <extra_id_0>  "]
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "han": ((0x4E00, 0x9FFF), (0x3400, 0x3420), (0x20000, 0x20020), (0x31350, 0x31360)),
    "kana": ((0x3041, 0x3096), (0x30A1, 0x30FA), (0xFF66, 0xFF9D), (0x3099, 0x309C)),
    "arabic": ((0x0621, 0x064A), (0x064B, 0x0652), (0x0660, 0x0669), (0x0600, 0x0605), (0xFE70, 0xFEFC)),
    "devanagari": ((0x0900, 0x0963), (0x0966, 0x096F)),
    "thai": ((0x0E01, 0x0E3A), (0x0E40, 0x0E5B)),
    "hangul": ((0xAC00, 0xD7A3), (0x1100, 0x1112), (0x1161, 0x1175), (0x11A8, 0x11C2)),
    "greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFE)),
    "cyrillic": ((0x0400, 0x052F),),
    "hebrew": ((0x05B0, 0x05EA),),
    "marks": ((0x0300, 0x036F), (0x1AB0, 0x1AC0), (0x20D0, 0x20F0), (0x1DC0, 0x1DFF)),
    "control": ((0x00, 0x1F), (0x7F, 0x9F), (0x200B, 0x200F), (0x202A, 0x202E), (0xFFF9, 0xFFFD)),
    "symbols": ((0x2010, 0x2BFF), (0x3000, 0x303F), (0x21, 0x2F), (0x3A, 0x40), (0xFE10, 0xFE6B)),
    "compatible": ((0x2070, 0x218B), (0x2460, 0x24FF), (0x3200, 0x33FF), (0xFB00, 0xFB4F), (0xFF00, 0xFFEF)),
    "latin": ((0xA0, 0x24F), (0x1E00, 0x1EFF)),
    "any": ((0x80, 0xD7FF), (0xE000, 0x10FFFF)),
    "recent": ((0x0870, 0x08E1), (0x1C89, 0x1C8A), (0xA7C0, 0xA7DC), (0x10D40, 0x10D8F), (0x1E5D0, 0x1E5FF)),
}


def word(rng: random.Random) -> str:
    """A word of one script, of a length that is now and then long."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(ENGLISH)
    if kind < 0.42:
        return rng.choice(EMOJI) * rng.choice((1, 1, 2))
    if kind < 0.47:
        return str(rng.randrange(10 ** rng.randrange(1, 12)))
    if kind < 0.49:
        return rng.choice(SPECIAL)
    if kind < 0.54:  # letters with marks, in any order
        return "".join(
            rng.choice("aeiouAEO한ガक")
            + "".join(chr(rng.randrange(0x300, 0x345)) for _ in range(rng.randrange(4)))
            for _ in range(rng.randrange(1, 5))
        )
    ranges = SCRIPTS[rng.choice(list(SCRIPTS))]
    length = rng.randrange(40, 300) if rng.random() < 0.01 else rng.randrange(1, 9)
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(length))


def line(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(0, 12)):
        parts.append(word(rng))
        parts.append(
            " "
            if rng.random() < 0.7
            else rng.choice(("", "", "  ", "   ", rng.choice(SPACES) * rng.choice((1, 2))))
        )
    return "".join(parts)


def lines(count: int, seed: int = 0) -> list[str]:
    """`count` lines of mixed scripts; a few are empty, and one in a thousand is very long."""
    rng = random.Random(seed)
    result = [line(rng) for _ in range(count)]
    for i in range(0, count, 1000):
        result[i] = word(rng) * rng.randrange(100, 2000)
    return result


def corpus() -> list[str]:
    """Text to train on: few enough words that merges are learnt."""
    rng = random.Random(7)
    words = [word(rng) for _ in range(1500)] + ENGLISH * 3
    return [" ".join(rng.choices(words, k=10)) for _ in range(3000)]


def byte_level_bpe(**options: Any) -> Tokenizer:
    return Tokenizer(models.BPE(**options))


def train_bpe(tokenizer: Tokenizer, size: int, special: list[str], **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        **options,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def clip() -> Tokenizer:
    """openai/clip-vit-large-patch14."""
    tokenizer = byte_level_bpe(
        unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    train_bpe(tokenizer, 3000, ["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>")
    ids = [(t, tokenizer.token_to_id(t)) for t in ("<|endoftext|>", "<|startoftext|>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ids, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def gpt2(prefix_space: bool = False) -> Tokenizer:
    tokenizer = byte_level_bpe(continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    train_bpe(tokenizer, 3000, ["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen2(pattern: str = QWEN2, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Qwen2 and, with other patterns, its cousins; merges that a word can skip."""
    tokenizer = byte_level_bpe(
        continuing_subword_prefix="", end_of_word_suffix="", ignore_merges=pattern == CL100K
    )
    tokenizer.normalizer = normalizer or normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    train_bpe(tokenizer, 3000, [])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>", "yesterday"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece_model(**options: Any) -> Any:
    """A unigram model with SentencePiece's own rules of normalisation, as its protocol buffer."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    stream = io.BytesIO()
    texts = [text.replace("\0", "") for text in corpus()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stream, vocab_size=2500, model_type="unigram",
        minloglevel=2, hard_vocab_limit=False, character_coverage=0.98, **options,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(stream.getvalue())
    return proto


def t5(rule: str = "nmt_nfkc", published: bool = True, byte_fallback: bool = False) -> Tokenizer:
    """As published for T5, or as today's converters write it; with SentencePiece's map of characters."""
    proto = sentencepiece_model(
        normalization_rule_name=rule, byte_fallback=byte_fallback, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    unk = next(i for i, piece in enumerate(proto.pieces) if piece.type == 2)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk, byte_fallback=byte_fallback))
    precompiled = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    if published:
        tokenizer.normalizer = precompiled
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [precompiled, normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.add_tokens([AddedToken("<extra_id_0>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def llama() -> Tokenizer:
    """BPE over characters with bytes for what it does not know, spaces as ▁."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=2500, show_progress=False, special_tokens=special, limit_alphabet=600
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def characters(unknown: bool, fuse: bool) -> Tokenizer:
    """BPE whose vocabulary lacks most characters; every simple pre-tokenizer, and tokens that strip."""
    tokenizer = Tokenizer(
        models.BPE(unk_token="<unk>" if unknown else None, fuse_unk=fuse, continuing_subword_prefix="##")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace() if fuse else pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("contiguous" if fuse else "isolated"),
            pre_tokenizers.Digits(individual_digits=not fuse),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, special_tokens=["<unk>"] if unknown else [], limit_alphabet=200,
        continuing_subword_prefix="##",
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(
        [
            AddedToken("photo", single_word=True),
            AddedToken("Night", lstrip=True, normalized=True),
            AddedToken("<mask>", lstrip=True, normalized=False),
            AddedToken("<pad>", rstrip=True, normalized=False),
            AddedToken("</s>", lstrip=True, rstrip=True, single_word=True, normalized=False),
            AddedToken("照片"),
        ]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.BertProcessing(("<pad>", 5), ("<mask>", 6))]
    )
    return tokenizer


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "demo" / "base" / "tokenizer" / "tokenizer.json"))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "demo": demo,
    "clip": clip,
    "gpt2": gpt2,
    "gpt2-prefix": lambda: gpt2(True),
    "qwen2": qwen2,
    "cl100k": lambda: qwen2(CL100K, normalizers.NFKC()),
    "o200k": lambda: qwen2(O200K, normalizers.NFD()),
    "t5": t5,
    "t5-converted": lambda: t5("nmt_nfkc_cf", published=False),
    "t5-bytes": lambda: t5("nfkc", published=False, byte_fallback=True),
    "llama": llama,
    "characters": lambda: characters(True, False),
    "characters-fused": lambda: characters(True, True),
    "characters-dropped": lambda: characters(False, False),
}


def letter_by_letter(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    """Gives the bytes of a text behind a normalizer, and a `|` behind each piece of a pre-tokenizer."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [], byte_fallback=True, unk_token="<0x00>", end_of_word_suffix="|")
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def old_merges(text: str) -> str:
    """A tokenizer file with its merges as strings, as they were written until 2024."""
    description = json.loads(text)
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    return json.dumps(description)
