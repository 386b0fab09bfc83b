"""Token ids in C++, against the `tokenizers` library and the Python runtime."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import text_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from hywu_runtime.errors import HywuError
from hywu_runtime.manifest import Tokenizer as Entry
from hywu_runtime.text import PromptEncoder

LINES = text_cases.lines(21_000)
MAIN = ("demo", "clip", "gpt2", "qwen2", "t5")  # the others see every fifth line
PROGRAM: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _program(executable: Callable[[str], Path]) -> None:
    PROGRAM[:] = [executable("hywu_encode_texts")]


def run(path: Path, texts: Iterable[str | bytes], *arguments: object, timeout: float = 120) -> list[str]:
    """The answers of `hywu_encode_texts`, a line for every text."""
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    data = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    command = [str(PROGRAM[0]), str(path), *map(str, arguments)]
    result = subprocess.run(command, input=data, capture_output=True, timeout=timeout)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout.decode().splitlines()


def ids(path: Path, texts: Iterable[str]) -> list[str]:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [" ".join(map(str, encoding.ids)) for encoding in tokenizer.encode_batch(list(texts))]


def compare(path: Path, texts: list[str]) -> None:
    got, expected = run(path, texts), ids(path, texts)
    assert len(got) == len(expected)
    wrong = [i for i in range(len(texts)) if got[i] != expected[i]]
    assert not wrong, (
        f"{len(wrong)} texts differ, the first: {texts[wrong[0]]!a}\n{got[wrong[0]]}\n{expected[wrong[0]]}"
    )


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tokenizers")

    def get(name: str) -> Path:
        path = folder / f"{name}.json"
        if not path.exists():
            text_cases.TOKENIZERS[name]().save(str(path))
        return path

    return get


@pytest.mark.parametrize("name", text_cases.TOKENIZERS)
def test_equals_the_library(tokenizer_file: Callable[[str], Path], name: str) -> None:
    compare(tokenizer_file(name), LINES if name in MAIN else LINES[:: len(MAIN)])


@pytest.mark.parametrize("name", ["clip", "qwen2", "t5-converted", "characters", "llama"])
@settings(max_examples=25)
@given(texts=st.lists(st.text() | st.text(" \t\n\xa0'sStT1a▁e\u0301\u0323ﬁ\r", max_size=30), min_size=20))
def test_any_text(tokenizer_file: Callable[[str], Path], name: str, texts: list[str]) -> None:
    compare(tokenizer_file(name), texts)


def test_merges_as_strings(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text_cases.old_merges(tokenizer_file("gpt2").read_text()))
    compare(path, LINES[:500])


def code_points() -> list[str]:
    """Code points of all planes between others: before and behind marks, letters, and what decomposes."""
    planes = ((0, 0x3400), (0xA000, 0xAC00), (0xD7A0, 0xD800), (0xF900, 0x12000), (0x16A00, 0x17000))
    planes += (
        (0x18CF0, 0x18D00),
        (0x1BC00, 0x1BCB0),
        (0x1CC00, 0x1FC00),
        (0x20000, 0x20010),
        (0x2A6D0, 0x2A720),
    )
    planes += (
        (0x2EBE0, 0x2EE70),
        (0x2F800, 0x2FA20),
        (0x31340, 0x31360),
        (0x323A0, 0x323C0),
        (0xE0000, 0xE01F0),
    )
    every = [chr(c) for first, end in planes for c in range(first, end)]
    return [
        " ".join(f"e{c}\u0323\u0301{c}\u0301a\u0327ﬁ{c} b{c}B" for c in every[i : i + 8])
        for i in range(0, len(every), 8)
    ]


NORMALIZERS: dict[str, Callable[[], Any]] = {
    "NFC": normalizers.NFC,
    "NFD": normalizers.NFD,
    "NFKC": normalizers.NFKC,
    "NFKD": normalizers.NFKD,
    "Lowercase": normalizers.Lowercase,
    "StripAccents": lambda: normalizers.Sequence([normalizers.StripAccents(), normalizers.Strip()]),
    "Precompiled": lambda: normalizers.Precompiled(
        text_cases.sentencepiece_model(
            normalization_rule_name="nmt_nfkc_cf"
        ).normalizer_spec.precompiled_charsmap
    ),
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers_for_every_code_point(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    text_cases.letter_by_letter(NORMALIZERS[name]()).save(str(path))
    compare(path, code_points())


PATTERNS = [
    r"\p{L}",
    r"\p{Lu}+",
    r"[\p{Ll}\p{Lm}]",
    r"\p{M}",
    r"\p{Nd}",
    r"[^\s\p{L}\p{N}]+",
    r"\w",
    r"\W",
    r"\s+",
]
PATTERNS += [
    r"\S",
    r"[^\S\r]",
    r"\d",
    r"\h",
    r"\p{Han}",
    r"\p{^L}",
    r"\P{Po}",
    r"\b",
    r"(?i:k|s|å)",
    r"(?i)[a-zß]",
]
PATTERNS += [r"[[:space:][:digit:]]", r"\p{Latin}", "^", "$", ".", r"\p{Cn}", text_cases.O200K]


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Digits(True),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.WhitespaceSplit(),
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS),
    ],
    ids=["Punctuation", "Digits", "Whitespace", "WhitespaceSplit", *PATTERNS],
)
def test_pre_tokenizers_for_every_code_point(
    tmp_path: Path, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> None:
    path = tmp_path / "tokenizer.json"
    text_cases.letter_by_letter(None, pre_tokenizer).save(str(path))
    compare(path, code_points()[::2])


SPLITTERS = [
    "-",
    "",
    "--",
    Regex("-*"),
    Regex("a|b-"),
    Regex("(?=-)"),
    Regex("x?"),
    Regex("[0-9]{2}+-?"),
    Regex("-{2}?"),
]
SPLITTERS += [
    Regex("(?i)A-|b"),
    Regex("a(?i)B|-"),
    Regex("(-)(?<name>a)"),
    Regex("a+?-|b*+-"),
    Regex(r"[]a\-]|[^-a]"),
]
SPLITTERS += [
    Regex(r"\x2d|\u0061"),
    Regex("a{,2}-"),
    Regex("a{x}|{"),
    Regex("a(?#comment)-"),
    Regex("(?m:a.)"),
    Regex("a."),
    Regex(r"[\p{N}-]"),
]
BEHAVIOURS = ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]


@pytest.mark.parametrize("splitter", SPLITTERS, ids=range(len(SPLITTERS)))
def test_splitting(tmp_path: Path, splitter: Any) -> None:
    texts = [
        "-",
        "a",
        "the-final--countdown",
        "--a--",
        "a-b-A-B--aa-bb",
        "12-345-6",
        "x--x",
        "a{x}{",
        "a\n-a-\n",
    ]
    texts += ["".join(letters) for letters in itertools.product("-ab", repeat=4)]
    for behaviour, invert in itertools.product(BEHAVIOURS, (False, True)):
        path = tmp_path / "tokenizer.json"
        split = pre_tokenizers.Split(splitter, behaviour, invert)
        text_cases.letter_by_letter(None, split).save(str(path))
        compare(path, texts)


@pytest.mark.parametrize("scheme", ["first", "never", "always"])
@pytest.mark.parametrize("split", [True, False])
def test_metaspace(tmp_path: Path, scheme: str, split: bool) -> None:
    """What counts as the first piece depends on what normalisers removed before it."""
    for normalizer in (
        normalizers.Strip(),
        normalizers.StripAccents(),
        normalizers.Replace(Regex("^x*"), "y"),
        normalizers.Sequence([normalizers.Replace(Regex("^[xé ]+"), "xy"), normalizers.NFC()]),
        normalizers.Sequence([normalizers.Prepend("<s>a"), normalizers.NFD(), normalizers.Replace("a", "")]),
    ):
        tokenizer = text_cases.letter_by_letter(
            normalizer, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        )
        tokenizer.add_special_tokens(["<s>"])
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        texts = [
            "a",
            " a",
            "  a b",
            "<s>a",
            "a<s>b",
            " <s> b<s>",
            "\u0301a<s>b",
            "xxa x",
            "▁a",
            "<s>",
            "ÀÉ é",
        ]
        compare(path, texts + LINES[:300])


def test_added_tokens_that_strip(tmp_path: Path) -> None:
    tokens = [
        AddedToken(" ", rstrip=True, normalized=False),
        AddedToken("a", lstrip=True, rstrip=True, normalized=False),
        AddedToken("  b", single_word=True, normalized=False),
        AddedToken("É", lstrip=True),
        AddedToken("é ", rstrip=True, special=True),
        AddedToken("ab", normalized=False),
    ]
    texts = ["".join(letters) for letters in itertools.product(" abÉ\u3000", repeat=5)]
    for some in (tokens, tokens[1:], tokens[1:2] + tokens[4:], tokens[2:]):
        tokenizer = text_cases.letter_by_letter(normalizers.Lowercase(), pre_tokenizers.Metaspace())
        tokenizer.add_tokens(some)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        compare(path, texts)
    tokenizer.add_tokens(tokens)
    tokenizer.save(str(path))
    assert run(path, [" " * 900_000], timeout=20)[0].count(" ") > 100_000


def test_post_processors_after_each_other(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> None:
    special = [("a", 1), ("b", 2)]
    template = processors.TemplateProcessing(single="a $A b $A", pair="$A b $B a", special_tokens=special)
    short = processors.TemplateProcessing(single="$A b", pair="$B a $A", special_tokens=special)
    bert, roberta = processors.BertProcessing(*special), processors.RobertaProcessing(*special)
    for chain in (
        [template],
        [short, template],
        [template, bert],
        [short, roberta, bert],
        [processors.ByteLevel(), bert, short],
    ):
        tokenizer = Tokenizer.from_file(str(tokenizer_file("gpt2")))
        tokenizer.post_processor = processors.Sequence(chain)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        compare(path, ["", "a", "a photo"])


@pytest.mark.parametrize(("length", "side"), [(77, "right"), (12, "left"), (2, "right"), (3, "left")])
@pytest.mark.parametrize("name", ["clip", "t5", "gpt2", "llama"])
def test_prompts_are_the_runtimes(
    tokenizer_file: Callable[[str], Path], name: str, length: int, side: Any
) -> None:
    texts = LINES[:600]
    path = tokenizer_file(name)
    expected_ids, expected_mask = PromptEncoder(path, Entry("t.json", length, 3, side)).encode(texts)
    got = run(path, texts, length, 3, side, "cut")
    for line, want_ids, want_mask in zip(got, expected_ids, expected_mask, strict=True):
        got_ids, got_mask = line.split(" | ")
        assert got_ids.split() == [str(i) for i in want_ids]
        assert got_mask.split() == [str(i) for i in want_mask]


def message(call: Callable[[], object]) -> str:
    with pytest.raises(HywuError) as error:
        call()
    return str(error.value)


def test_what_is_too_long(tokenizer_file: Callable[[str], Path]) -> None:
    path = tokenizer_file("clip")
    text = "a long prompt " * 50
    python = message(lambda: PromptEncoder(path, Entry("t.json", 12, 1, truncate=False)).encode([text]))
    assert run(path, ["short", text], 12, 1, "right", "refuse")[1] == f"error: {python}"
    python = message(lambda: PromptEncoder(path, Entry("t.json", 12, 1)).encode(["x" * 1_000_001]))
    assert run(path, ["x" * 1_000_001], 12, 1, "right", "cut") == [f"error: {python}"]
    # Less than the special tokens that are always there.
    python = message(lambda: PromptEncoder(path, Entry("t.json", 1, 1)).encode(["x"]))
    assert run(path, ["x"], 1, 1, "right", "cut") == [f"error: {python}"]


BROKEN = [
    b"\xff",
    b"a\x80b",
    b"\xc3",
    b"\xe4\xbd",
    b"\xf0\x9f\x98",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf5\x80\x80\x80",
]


def test_broken_utf8_is_refused_by_both(tokenizer_file: Callable[[str], Path]) -> None:
    path = tokenizer_file("demo")
    encoder = PromptEncoder(path, Entry("t.json", 32, 1))
    texts = BROKEN + [line.encode()[:-1] for line in LINES[:4000] if line and ord(line[-1]) > 127]
    texts += [line.encode() + part for line in LINES[:500] for part in BROKEN]
    assert len(texts) > 4000
    for text, answer in zip(texts, run(path, texts, 32, 1, "right", "cut"), strict=True):
        python = message(lambda text=text: encoder.encode([text.decode("utf-8", "surrogateescape")]))
        assert "is not valid Unicode" in python
        assert "is not valid Unicode. Expected UTF-8 without surrogates. Decode it" in answer


def test_nothing_and_nul_are_text(tokenizer_file: Callable[[str], Path]) -> None:
    for name in ("clip", "t5", "llama", "characters"):
        compare(tokenizer_file(name), ["", "\0", "a\0b", "\0" * 10, " ", "\ufeff"])


def description(tokenizer_file: Callable[[str], Path], name: str = "demo") -> dict[str, Any]:
    result: dict[str, Any] = json.loads(tokenizer_file(name).read_text())
    return result


UNSUPPORTED = {
    "model": ({"type": "WordPiece", "vocab": {}, "unk_token": "a"}, "'WordPiece'"),
    "normalizer": ({"type": "BertNormalizer"}, "'BertNormalizer'"),
    "pre_tokenizer": (
        {"type": "Sequence", "pretokenizers": [{"type": "UnicodeScripts"}]},
        "'UnicodeScripts'",
    ),
    "post_processor": ({"type": "Sequence", "processors": [{"type": "New\nOne"}]}, r"'New\nOne'"),
    "version": ("2.0", "version"),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_other_types_are_refused_by_name(
    tokenizer_file: Callable[[str], Path], tmp_path: Path, key: str
) -> None:
    value, name = UNSUPPORTED[key]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description(tokenizer_file) | {key: value}))
    (answer,) = run(path, ["a"], 12, 1, "right", "cut")
    assert answer.startswith("error: tokenizer.json cannot be used here: its ")
    assert name in answer
    assert answer.endswith("Give token ids instead of texts, or use the Python runtime.")


PATTERNS_REFUSED = [
    r"(a)\1",
    r"\k<a>",
    "[a&&b]",
    "[a[b]]",
    "(?~a)",
    r"\R",
    r"\pL",
    r"\p{Klingon}",
    "(?x:a)",
    "a{2,1}",
]
PATTERNS_REFUSED += [
    "(",
    ")",
    "[",
    "[]",
    "*a",
    "\\",
    r"\xff",
    "[b-a]",
    "(" * 300 + ")" * 300,
    "a" * 70_000,
    "(?<a",
    "(?#",
]
PATTERNS_REFUSED += [r"[\p{L}-z]", "[a-\\d]", r"\cA", "[[:alpha:]]", "(?<=a*)b"]


@pytest.mark.parametrize("pattern", PATTERNS_REFUSED, ids=lambda p: p[:10])
def test_regular_expressions_that_are_refused(
    tokenizer_file: Callable[[str], Path], tmp_path: Path, pattern: str
) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description(tokenizer_file) | {"pre_tokenizer": split}))
    (answer,) = run(path, ["a"])
    assert answer.startswith("error: the regular expression ")
    assert "of its pre_tokenizer cannot be used: " in answer
    assert len(answer) < 250


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no model": lambda d: d.pop("model"),
    "no vocabulary": lambda d: d["model"].pop("vocab"),
    "no merges": lambda d: d["model"].pop("merges"),
    "a merge of one": lambda d: d["model"]["merges"].append(["a"]),
    "a merge of three": lambda d: d["model"]["merges"].append(["a", "b", "c"]),
    "a merge of a number": lambda d: d["model"]["merges"].append(5),
    "a merge of nothing known": lambda d: d["model"]["merges"].append(["a", "不"]),
    "an id that is negative": lambda d: d["model"]["vocab"].update(x=-1),
    "an id that is too large": lambda d: d["model"]["vocab"].update(x=2**32),
    "an id that is text": lambda d: d["model"]["vocab"].update(x="1"),
    "scores": lambda d: d["model"].update(vocab=[["a", 1.0]]),
    "added tokens that are none": lambda d: d.update(added_tokens={"a": 1}),
    "an added token without content": lambda d: d["added_tokens"].append({"id": 1}),
    "a template of what is not there": lambda d: d.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a charsmap that is cut": lambda d: d.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "//8AAAAA"}
    ),
    "a charsmap that is no base64": lambda d: d.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "?"}
    ),
    "a normalizer that is a list": lambda d: d.update(normalizer=[]),
    "a behaviour that is a number": lambda d: d.update(pre_tokenizer={"type": "Punctuation", "behavior": 1}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tokenizer_file: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    damaged = description(tokenizer_file)
    DAMAGED[name](damaged)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged))
    (answer,) = run(path, ["a"], 12, 1, "right", "cut")
    assert answer.startswith("error: tokenizer.json is not a usable tokenizer: ")
    assert answer.endswith("Expected a Hugging Face `tokenizers` file. Copy or export the bundle again.")
    with pytest.raises(BaseException):  # noqa: B017, PT011  the library panics at some of these
        Tokenizer.from_file(str(path)).encode("a")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": 5}', b"[" * 10_000, b'{"a":"\xff"}']
)
def test_files_that_are_no_tokenizers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    (answer,) = run(path, ["a"], 12, 1, "right", "cut")
    assert answer.startswith("error: tokenizer.json is not a usable tokenizer: ")
    (answer,) = run(tmp_path / "none.json", ["a"], 12, 1, "right", "cut")
    assert "none.json is not a usable tokenizer: No such file" in answer


def test_cut_off_files(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> None:
    whole = tokenizer_file("t5").read_bytes()
    path = tmp_path / "tokenizer.json"
    for end in range(0, len(whole) - 1, len(whole) // 25):
        path.write_bytes(whole[:end])
        (answer,) = run(path, ["a"])
        assert answer.startswith("error: ")


def test_unknown_characters_without_an_unknown_token(
    tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    damaged = description(tokenizer_file, "t5")
    damaged["model"]["unk_id"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged))
    known, unknown = run(path, ["photo", "photo 𐀀"], 12, 1, "right", "cut")
    assert " | " in known
    assert "has no unknown token" in unknown
    assert unknown.endswith("Use other words, or export the bundle again.")


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(.*)*=", "(?:a|b|ab)*c", "(x+x+)+y"])
def test_hopeless_searches_end_in_an_error(tmp_path: Path, pattern: str) -> None:
    path = tmp_path / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    hopeless = json.loads(text_cases.letter_by_letter().to_str()) | {"pre_tokenizer": split}
    path.write_text(json.dumps(hopeless))
    begin = time.monotonic()
    for answer in run(path, ["ab" * 2000, "a" * 5000, "x" * 3000], 12, 1, "right", "cut"):
        assert " | " in answer or "cannot be cut into words: its search takes too much time" in answer
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("name", ["clip", "qwen2", "t5", "llama", "characters-fused"])
def test_a_word_of_a_megabyte(tokenizer_file: Callable[[str], Path], name: str) -> None:
    """Time grows with n log n at most: a quadratic algorithm would take hours."""
    words = ["photo" * 190_000, "照片" * 160_000, "e\u0301" * 330_000, " " * 950_000, "1" * 950_000]
    begin = time.monotonic()
    answers = run(tokenizer_file(name), words, timeout=60)
    assert time.monotonic() - begin < 30
    assert not any(answer.startswith("error") for answer in answers)
    short = [word[: len(word) // 8] for word in words]
    compare(tokenizer_file(name), short)
