"""Writes runtime/src/text/unicode_tables.cpp.

The `tokenizers` library brings Unicode tables of several versions: that of its normaliser is 9.0, those of
its regular expressions and of Rust are newer than what the C++ runtime's libraries (PCRE2, utf8proc) know on
today's systems. The tables written here are the differences, read off the library by asking it about every
code point. Run it with CPython 3.11, whose `unicodedata` is 14.0 like the oldest PCRE2 and utf8proc that are
supported, and with Perl, which knows the version that assigned a code point:

    python3.11 tools/unicode_tables.py > runtime/src/text/unicode_tables.cpp
"""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Iterable

from tokenizers import Regex, normalizers, pre_tokenizers

BASE = "14.0.0"
CATEGORIES = [
    a + b
    for a, kinds in zip("LMNPSZC", ("ultmo", "nce", "dlo", "cdseifo", "mcko", "slp", "cfno"))
    for b in kinds
]
EVERY = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
SCRIPTS = ["Armenian", "Bengali", "Bopomofo", "Devanagari", "Greek", "Han", "Hangul", "Hebrew"]
SCRIPTS += ["Hiragana", "Katakana", "Latin", "Thai"]


def ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for c in sorted(points):
        if result and result[-1][1] == c - 1:
            result[-1] = (result[-1][0], c)
        else:
            result.append((c, c))
    return result


def matched(pattern: str) -> set[int]:
    """The code points that a one-character pattern matches in the library."""
    left = normalizers.Replace(Regex(pattern), "").normalize_str("".join(map(chr, EVERY)))
    return set(EVERY) - set(map(ord, left))


def splits(pre_tokenizer: pre_tokenizers.PreTokenizer) -> set[int]:
    return {c for c in EVERY if len(pre_tokenizer.pre_tokenize_str(f"a{chr(c)}a")) > 1}


def later_than_9() -> list[tuple[int, int]]:
    script = "no warnings; for (0..0x10ffff) { next if $_ >= 0xd800 && $_ <= 0xdfff; "
    script += 'print "$_\\n" unless chr($_) =~ /\\p{Present_In: 9.0}/ }'
    lines = subprocess.run(["perl", "-e", script], check=True, capture_output=True, text=True).stdout
    return ranges(map(int, lines.split()))


def table(comment: str, kind: str, name: str, entries: list[str]) -> None:
    print(f"\n// {comment}\nstatic const {kind} {name}_data[] = {{")
    line = "   "
    for entry in entries:
        if len(line) + len(entry) + 2 > 110:
            print(line)
            line = "   "
        line += f" {entry},"
    print(line + "\n};")
    print(f"const Table<{kind}> {name} = {{{name}_data, {len(entries)}}};")


def main() -> None:
    if unicodedata.unidata_version != BASE:
        sys.exit(f"unicodedata is {unicodedata.unidata_version}. Expected {BASE}. Run it with CPython 3.11.")
    old = {c: unicodedata.category(chr(c)) for c in EVERY}
    scripts = {c: script for script in SCRIPTS for c in matched(rf"\p{{{script}}}")}

    def kinds(c: int, category: str) -> list[tuple[str, int, str]]:
        """What a stand-in for `c` has to agree in, best first: category, length and, if it can, script."""
        width = len(chr(c).encode())
        return [(category, width, scripts.get(c, "")), (category, width, "")]

    first: dict[tuple[str, int, str], int] = {}
    for c in reversed(EVERY):
        if old[c] != "Cn":
            first[kinds(c, old[c])[0]] = c
    recent = []
    for category in CATEGORIES:
        by: dict[int, set[int]] = {}
        for c in matched(rf"\p{{{category}}}"):
            if old[c] == "Cn" and category != "Cn":
                stand_in = next(first[kind] for kind in kinds(c, category) if kind in first)
                by.setdefault(stand_in, set()).add(c)
        recent += [(a, b, stand_in) for stand_in, new in by.items() for a, b in ranges(new)]
    lower = []
    lowercase = normalizers.Lowercase()
    for c in EVERY:
        have = lowercase.normalize_str(chr(c))
        if have != chr(c).lower():
            lower.append((c, ord(have)))
    digits = splits(pre_tokenizers.Digits(individual_digits=True))
    numbers = {c for c in digits if not old[c].startswith("N")}
    strip = normalizers.StripAccents()
    marks = {c for c in EVERY if strip.normalize_str(chr(c)) == ""}
    punctuation = splits(pre_tokenizers.Punctuation())

    print(
        "// Written by tools/unicode_tables.py, which says what these are. Do not edit.\n// clang-format off"
    )
    print('#include "text/unicode_tables.hpp"\n\nnamespace hywu::text {')
    table(
        "Not assigned in Unicode 9.0.",
        "CodePointRange",
        "later_than_9",
        [f"{{{a:#x}, {b:#x}}}" for a, b in later_than_9()],
    )
    table(
        "Assigned since Unicode 14.0: a code point of 14.0 of the same category and length.",
        "StandIn",
        "stand_ins",
        [f"{{{a:#x}, {b:#x}, {s:#x}}}" for a, b, s in sorted(recent)],
    )
    table(
        "Lower-case forms since Unicode 14.0.",
        "CodePointPair",
        "recent_lower",
        [f"{{{a:#x}, {b:#x}}}" for a, b in lower],
    )
    table(
        "Numbers (general category N) since Unicode 14.0.",
        "CodePointRange",
        "recent_numbers",
        [f"{{{a:#x}, {b:#x}}}" for a, b in ranges(numbers)],
    )
    table(
        "Marks, as the normaliser StripAccents removes them.",
        "CodePointRange",
        "marks",
        [f"{{{a:#x}, {b:#x}}}" for a, b in ranges(marks)],
    )
    table(
        "What the pre-tokenizer Punctuation splits at.",
        "CodePointRange",
        "punctuation",
        [f"{{{a:#x}, {b:#x}}}" for a, b in ranges(punctuation)],
    )
    words = ranges(set(EVERY) - splits(pre_tokenizers.Whitespace()))
    table(
        r"\w of Rust's regular expressions.",
        "CodePointRange",
        "words",
        [f"{{{a:#x}, {b:#x}}}" for a, b in words],
    )
    print("\n}  // namespace hywu::text")


if __name__ == "__main__":
    main()
