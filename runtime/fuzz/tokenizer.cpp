// A tokenizer file, up to the first NUL byte, and a text for it.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/error.hpp"
#include "text/prompt_encoder.hpp"
#include "text/regex.hpp"
#include "text/tokenizer.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hywu;
    const std::string_view input(reinterpret_cast<const char*>(data), size);
    const std::size_t end = input.find('\0');
    const std::string_view text = end == std::string_view::npos ? std::string_view() : input.substr(end + 1);
    try {
        const text::Tokenizer tokenizer(input.substr(0, end));
        text::check_text(text);
        const auto whole = tokenizer.encode(text);
        const auto cut = tokenizer.encode(text, 8);
        if (cut.ids.size() > whole.ids.size()) __builtin_trap();
    } catch (const text::FileError&) {
    } catch (const text::UnsupportedTokenizer&) {
    } catch (const text::UnknownToken&) {
    } catch (const text::PatternError&) {
    } catch (const core::Error&) {
    }
    return 0;
}
