"""Writes runtime/src/text/unicode_tables.cpp.

The `tokenizers` library brings Unicode tables of several versions: that of its normaliser is 9.0, those of its
regular expressions and of Rust are newer than what the C++ runtime's libraries (PCRE2, utf8proc) know on today's
systems. The tables written here are the differences, read off the library by asking it about every code point.
Run it with CPython 3.11, whose `unicodedata` is 14.0 like the oldest PCRE2 and utf8proc that are supported, and
with Perl, which knows the version that assigned a code point:

    python3.11 tools/unicode_tables.py > runtime/src/text/unicode_tables.cpp
"""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Iterable

from tokenizers import Regex, normalizers, pre_tokenizers

BASE = "14.0.0"
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cn Co".split()
EVERY = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
# A code point of Unicode 14 of every category, of two, three and four bytes; Han where it can be.
STAND_INS = {
    ("Cf", 4): 0xE0001,
    ("Ll", 3): 0x1D00,
    ("Ll", 4): 0x10428,
    ("Lm", 4): 0x16B40,
    ("Lo", 4): 0x10280,
    ("Lu", 3): 0x1E00,
    ("Lu", 4): 0x10400,
    ("Mc", 3): 0x0903,
    ("Mc", 4): 0x11000,
    ("Mn", 3): 0x0900,
    ("Mn", 4): 0x11001,
    ("Nd", 4): 0x104A0,
    ("No", 4): 0x10107,
    ("Pd", 4): 0x10EAD,
    ("Po", 3): 0x203B,
    ("Po", 4): 0x10100,
    ("Sm", 4): 0x1D6C1,
    ("So", 3): 0x2605,
    ("So", 4): 0x1F600,
}
HAN = 0x20000


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
    names = {chr(c): unicodedata.category(chr(c)) for c in EVERY}
    recent = []
    han = matched(r"\p{Han}")
    for category in CATEGORIES:
        new = {c for c in matched(rf"\p{{{category}}}") if names[chr(c)] == "Cn" and category != "Cn"}
        for part, script in ((new & han, True), (new - han, False)):
            for first, last in ranges(part):
                width = len(chr(first).encode())
                stand_in = HAN if script and width == 4 else STAND_INS[category, width]
                assert len(chr(stand_in).encode()) == width, category
                assert names[chr(stand_in)] == category, (category, hex(stand_in))
                recent.append((first, last, stand_in))
    lower = []
    lowercase = normalizers.Lowercase()
    for c in EVERY:
        have = lowercase.normalize_str(chr(c))
        if have != chr(c).lower():
            lower.append((c, ord(have)))
    digits = splits(pre_tokenizers.Digits(individual_digits=True))
    numbers = {c for c in digits if not names[chr(c)].startswith("N")}
    marks = {c for c in EVERY if normalizers.StripAccents().normalize_str(chr(c)) == ""}
    punctuation = splits(pre_tokenizers.Punctuation())

    print("// Written by tools/unicode_tables.py, which says what these are. Do not edit.")
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
