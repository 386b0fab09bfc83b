// Where the `tokenizers` library's knowledge of Unicode differs from that of PCRE2 and utf8proc; see
// tools/unicode_tables.py. All are sorted.
#pragma once

#include <cstddef>

namespace hywu::text {

struct CodePointRange {
    char32_t first, last;
};
struct CodePointPair {
    char32_t from, to;
};
struct StandIn {
    char32_t first, last, by;
};

template <class T>
struct Table {
    const T* data;
    std::size_t size;
    const T* begin() const noexcept { return data; }
    const T* end() const noexcept { return data + size; }
};

extern const Table<CodePointRange> later_than_9;    // not assigned in Unicode 9.0
extern const Table<StandIn> stand_ins;              // assigned since 14.0, with an older one of its kind
extern const Table<CodePointPair> recent_lower;     // lower-case forms since 14.0
extern const Table<CodePointRange> recent_numbers;  // general category N, since 14.0
extern const Table<CodePointRange> marks;           // what StripAccents removes
extern const Table<CodePointRange> punctuation;     // what Punctuation splits at
extern const Table<CodePointRange> words;           // \w of Rust's regular expressions

}  // namespace hywu::text
