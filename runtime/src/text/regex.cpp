#include "text/regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <new>
#include <optional>

#include "core/text.hpp"

namespace hywu::text {

namespace {

template <auto free>
struct Free {
    template <class T>
    void operator()(T* pointer) const noexcept {
        free(pointer);
    }
};
using CompileContext = std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>>;

// KiB for repeated groups, a frame of about 150 bytes for each repetition.
constexpr std::uint32_t heap_limit = 256 << 10;
// Steps from one starting point, beside a few for every byte of the text.
constexpr std::uint32_t base_steps = 1'000'000;

using Clock = std::chrono::steady_clock;

struct Budget {
    Clock::time_point end;
    std::uint32_t calls = 0;
};

// Called for every starting point that is tried: PCRE2 limits the steps of each, not their sum.
int still_time(pcre2_callout_block* /*block*/, void* data) {
    auto* budget = static_cast<Budget*>(data);
    if (++budget->calls % 16 != 0) return 0;
    return Clock::now() < budget->end ? 0 : PCRE2_ERROR_MATCHLIMIT;
}

// When the searches of this thread have to end, while there is a SearchTime.
thread_local std::optional<Clock::time_point> common_end;

// The text with code points that PCRE2 may not know replaced by others like them, of the same length.
std::string known(std::string_view text) {
    std::string result(text);
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t begin = at;
        if (static_cast<unsigned char>(text[at]) < 0xe0) {  // the tables begin at U+0897, three bytes
            ++at;
            continue;
        }
        const char32_t c = core::decode_utf8(text, at);
        const char32_t by = stand_in(c);
        if (by == c) continue;
        std::string bytes;
        core::append_utf8(bytes, by);
        if (bytes.size() == at - begin) result.replace(begin, bytes.size(), bytes);
    }
    return result;
}

}  // namespace

SearchTime::SearchTime() { common_end = Clock::now() + limit; }
SearchTime::~SearchTime() { common_end.reset(); }

struct Regex::Code {
    std::unique_ptr<pcre2_code, Free<pcre2_code_free>> code;
};

Regex::Regex(std::string_view pattern) : code_(std::make_unique<Code>()) {
    const std::string translated = "(?C1)(?:" + to_pcre2(pattern) + ")";
    const CompileContext context(pcre2_compile_context_create(nullptr));
    if (!context) throw std::bad_alloc();
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    pcre2_set_parens_nest_limit(context.get(), 250);
    int error = 0;
    std::size_t where = 0;
    code_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &where, context.get()));
    if (!code_->code) {
        std::array<PCRE2_UCHAR, 256> message{};
        pcre2_get_error_message(error, message.data(), message.size());
        throw PatternError(reinterpret_cast<const char*>(message.data()));
    }
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

Matches Regex::find(std::string_view text) const {
    Matches matches;
    if (text.empty()) return matches;
    const MatchContext context(pcre2_match_context_create(nullptr));
    const MatchData data(pcre2_match_data_create(1, nullptr));
    if (!context || !data) throw std::bad_alloc();
    Budget budget{common_end ? *common_end : Clock::now() + SearchTime::limit};
    pcre2_set_callout(context.get(), still_time, &budget);
    pcre2_set_heap_limit(context.get(), heap_limit);
    pcre2_set_match_limit(context.get(), base_steps + 16 * static_cast<std::uint32_t>(text.size()));

    const std::string subject = known(text);
    std::size_t from = 0, behind = 0;
    bool any = false;
    while (from <= subject.size()) {
        const int rc = pcre2_match(code_->code.get(), reinterpret_cast<PCRE2_SPTR>(subject.data()),
                                   subject.size(), from, PCRE2_NO_UTF_CHECK, data.get(), context.get());
        if (rc == PCRE2_ERROR_NOMATCH) break;
        if (rc < 0) throw PatternError("its search takes too much time or memory");
        const std::size_t* found = pcre2_get_ovector_pointer(data.get());
        const std::size_t begin = found[0], end = found[1];
        if (begin == end && any && begin == behind) {  // no empty match right behind the last one
            if (from == subject.size()) break;
            core::decode_utf8(subject, from);
            continue;
        }
        if (begin < behind || end < begin) break;  // \K could do that, but is refused
        if (behind < begin) matches.push_back({behind, begin, false});
        matches.push_back({begin, end, true});
        from = behind = end;
        any = true;
    }
    if (behind < text.size()) matches.push_back({behind, text.size(), false});
    return matches;
}

}  // namespace hywu::text
