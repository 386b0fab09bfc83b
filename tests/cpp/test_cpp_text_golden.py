"""The token ids that the C++ unit tests compare with, where there is no Python, are the library's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_cases
from tokenizers import Tokenizer

FILE = Path(text_cases.ROOT) / "runtime" / "tests" / "text" / "golden.json"
GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids_are_the_librarys(name: str) -> None:
    entry = GOLDEN[name]
    if "file" in entry:
        tokenizer = Tokenizer.from_file(str(text_cases.ROOT / entry["file"]))
    else:
        tokenizer = Tokenizer.from_str(json.dumps(entry["tokenizer"]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text, ids in entry["ids"].items():
        assert tokenizer.encode(text).ids == ids, ascii(text)
