// Tokenizers. That ids are the `tokenizers` library's on many thousand lines is shown in tests/cpp; here are
// those that run wherever the library does, under sanitizers and emulators.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/error.hpp"
#include "core/files.hpp"
#include "core/log.hpp"
#include "text/hash.hpp"
#include "text/prompt_encoder.hpp"
#include "text/regex.hpp"
#include "text/tokenizer.hpp"
#include "text/trie.hpp"

using namespace hywu;
using namespace hywu::text;

namespace {

const std::filesystem::path repository = core::path_of(HYWU_REPOSITORY_DIR);
const std::filesystem::path demo = repository / "demo/base/tokenizer/tokenizer.json";

core::Tokenizer entry(std::int64_t length, bool truncate = true) {
    core::Tokenizer result;
    result.max_length = length;
    result.pad_id = 7;
    result.truncate = truncate;
    return result;
}

template <class Call>
core::Error error_of(Call&& call) {
    try {
        call();
    } catch (const core::Error& error) {
        return error;
    }
    FAIL("no error");
    throw std::logic_error("no error");
}

}  // namespace

TEST_CASE("ids are those of the tokenizers library") {
    std::ifstream file(core::path_of(HYWU_SOURCE_DIR) / "tests/text/golden.json");
    const auto golden = nlohmann::json::parse(file);
    REQUIRE(golden.size() >= 8);
    for (const auto& entry : golden.items()) {  // no structured bindings: CAPTURE makes lambdas
        const std::string& name = entry.key();
        const auto& tokenizer = entry.value();
        CAPTURE(name);
        const std::string json =
            tokenizer.contains("file")
                ? core::read_file(repository / core::path_of(tokenizer["file"].get<std::string>()),
                                  max_tokenizer_bytes)
                : tokenizer["tokenizer"].dump();
        const Tokenizer encoder(json);
        for (const auto& pair : tokenizer["ids"].items()) {
            const std::string& text = pair.key();
            const auto& ids = pair.value();
            CAPTURE(text);
            CHECK(encoder.encode(text).ids == ids.get<Ids>());
        }
    }
}

TEST_CASE("one encoder serves many threads") {
    const PromptEncoder encoder(demo, entry(32));
    const std::vector<std::string> texts = {"make it look like an old photograph", "把照片变成老照片", "",
                                            "it's 1920"};
    const Encoded expected = encoder.encode(texts);
    CHECK(expected.ids.size() == 4 * 32);
    std::vector<std::thread> threads;
    std::vector<int> equal(4);
    for (std::size_t i = 0; i < equal.size(); ++i) {
        threads.emplace_back([&, i] {
            for (int round = 0; round < 20; ++round) {
                const Encoded got = encoder.encode(texts);
                equal[i] += got.ids == expected.ids && got.mask == expected.mask;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const int rounds : equal) CHECK(rounds == 20);
}

TEST_CASE("padding, cutting and refusing") {
    core::Tokenizer left = entry(8);
    left.pad_side = core::PadSide::left;
    const Encoded right_padded = PromptEncoder(demo, entry(8)).encode({"photo"});
    const Encoded left_padded = PromptEncoder(demo, left).encode({"photo"});
    CHECK(right_padded.ids.back() == 7);
    CHECK(right_padded.mask.back() == 0);
    CHECK(left_padded.ids.front() == 7);
    CHECK(left_padded.mask.front() == 0);

    std::vector<std::string> messages;
    core::set_log_sink([&](core::LogLevel, const std::string& message) { messages.push_back(message); },
                       core::LogLevel::warning);
    const std::string text = "a long prompt about an old photograph and its colours";
    const Encoded cut = PromptEncoder(demo, entry(8)).encode({"photo", text});
    core::set_log_sink({}, core::LogLevel::off);
    CHECK(messages == std::vector<std::string>{
                          "the prompt 'a long prompt about an old photograph and its colours' is longer "
                          "than 8 tokens and was cut"});
    CHECK(cut.ids[15] == 712);  // the end is kept
    const core::Error error = error_of([&] { PromptEncoder(demo, entry(8, false)).encode({text}); });
    CHECK(error.kind() == core::ErrorKind::input);
    CHECK(error.expected() == "This bundle takes 8");
}

TEST_CASE("a template") {
    core::Tokenizer asking = entry(16);
    asking.text_template = "a photo, {} please";
    const Encoded got = PromptEncoder(demo, asking).encode({"sepia", "{}"});
    CHECK(got.ids ==
          PromptEncoder(demo, entry(16)).encode({"a photo, sepia please", "a photo, {} please"}).ids);
}

TEST_CASE("texts in lower case") {
    core::Tokenizer lower = entry(16);
    lower.text_template = "A {}";
    lower.lowercase = true;
    core::Tokenizer as_it_is = lower;
    as_it_is.lowercase = false;
    CHECK(PromptEncoder(demo, lower).encode({" \tMake It SEPIA\u3000\n"}).ids ==
          PromptEncoder(demo, as_it_is).encode({"make it sepia"}).ids);
}

TEST_CASE("texts that are none") {
    for (const std::string text : {"\xff", "a\xc3", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xc0\x80"}) {
        CAPTURE(core::show(text));
        const core::Error error = error_of([&] { check_text(text); });
        CHECK(error.kind() == core::ErrorKind::input);
        CHECK(!error.expected().empty());
        CHECK(!error.remedy().empty());
    }
    CHECK_THROWS_AS(check_text(std::string(1'000'001, 'a')), core::Error);
    CHECK_THROWS_AS(check_text(std::string(5'000'000, '\xff')), core::Error);
    check_text("");
    check_text(std::string("\0", 1));
    check_text(std::string(1'000'000, 'a'));
}

TEST_CASE("a tokenizer file that is cut off or changed is an error") {
    const std::string whole = core::read_file(demo, max_tokenizer_bytes);
    for (std::size_t size = 0; size < whole.size() - 1; size += 97) {
        CHECK_THROWS_AS(Tokenizer(whole.substr(0, size)), FileError);
    }
    std::mt19937 random(1);
    for (int i = 0; i < 300; ++i) {
        std::string changed = whole;
        changed[random() % changed.size()] = static_cast<char>(random() % 128);
        try {
            Tokenizer(changed).encode("a photo, 12");
        } catch (const FileError&) {
        } catch (const UnsupportedTokenizer&) {
        } catch (const UnknownToken&) {
        }
    }
}

TEST_CASE("other types are refused by name") {
    const std::string part =
        R"({"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": {"type": "Nmt"}})";
    CHECK_THROWS_WITH_AS(Tokenizer{part}, "its normalizer is of the type 'Nmt'", UnsupportedTokenizer);
    const std::string model = R"({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}})";
    CHECK_THROWS_WITH_AS(Tokenizer{model}, "its model is of the type 'WordLevel'", UnsupportedTokenizer);
    const std::filesystem::path path = std::filesystem::temp_directory_path() / "hywu_text_tests.json";
    std::ofstream(path) << part;
    const core::Error error = error_of([&] { PromptEncoder(path, entry(8)); });
    CHECK(error.kind() == core::ErrorKind::unsupported);
    std::filesystem::remove(path);
    const core::Error missing = error_of([&] { PromptEncoder(path, entry(8)); });
    CHECK(missing.kind() == core::ErrorKind::bundle);
}

TEST_CASE("regular expressions become PCRE2's") {
    CHECK(to_pcre2(R"(\p{L}+|\p{N}{1,3})") == R"(\p{L}+|\p{N}{1,3})");
    CHECK(to_pcre2("a{2}?") == "(?:a{2})?");
    CHECK(to_pcre2("a{1,2}+") == "(?:a{1,2})+");
    CHECK(to_pcre2("a{,2}") == "a{0,2}");
    CHECK(to_pcre2("a?+b++") == "a?+b++");
    CHECK(to_pcre2("(a)(?<name>b)") == "(?:a)(?:b)");
    CHECK(to_pcre2("a(?i)b|c") == "a(?i:b|c)");
    CHECK(to_pcre2("(?m:.)") == "(?s:.)");
    CHECK(to_pcre2(R"([\h-])") == R"([0-9A-Fa-f\x{2d}])");
    CHECK(to_pcre2(R"(\u3040\t)") == "\u3040\\x{9}");
    for (const char* pattern : {R"((a)\1)", "[a&&b]", "[a[b]]", "(?x:a)", R"(\R)", "(", "[", "*", "a{2,1}"}) {
        CAPTURE(pattern);
        CHECK_THROWS_AS(to_pcre2(pattern), PatternError);
    }
    // Empty matches, never two at one place.
    const Matches matches = Regex("x*").find("axb");
    REQUIRE(matches.size() == 5);
    CHECK(matches[0].end == 0);
    CHECK(matches[2].begin == 1);
    CHECK(matches[2].end == 2);
    CHECK_THROWS_AS(Regex("(x+x+)+[0-9]").find(std::string(400, 'x')), PatternError);
}

TEST_CASE("a trie finds all prefixes, shortest first") {
    const Trie trie({{"a", 1}, {"abc", 2}, {"ab", 3}, {"", 4}, {"b", 5}, {"abd", 6}, {"a", 7}, {"照片", 8}});
    std::vector<std::pair<std::size_t, std::uint32_t>> found;
    trie.prefixes("abcd", [&](std::size_t size, std::uint32_t value) { found.emplace_back(size, value); });
    CHECK(found == std::vector<std::pair<std::size_t, std::uint32_t>>{{1, 7}, {2, 3}, {3, 2}});
    CHECK(trie.find("照片") == 8);
    CHECK(!trie.find(""));
    CHECK(!trie.find("abcd"));
    CHECK(!Trie().find("a"));
    CHECK_THROWS_AS(Trie({{std::string(2000, 'a'), 1}}), std::length_error);

    std::mt19937 random(2);
    std::vector<std::string> words;
    for (int i = 0; i < 2000; ++i) {
        std::string word;
        for (std::size_t size = 1 + random() % 6; size > 0; --size)
            word += static_cast<char>('a' + random() % 3);
        words.push_back(word);
    }
    std::vector<Trie::Entry> entries;
    for (std::size_t i = 0; i < words.size(); ++i)
        entries.emplace_back(words[i], static_cast<std::uint32_t>(i));
    const Trie large(entries);
    for (const std::string& word : words) {
        const auto value = large.find(word);
        REQUIRE(value);
        CHECK(words[*value] == word);
    }
}

TEST_CASE("scores are read as serde_json reads them") {
    CHECK(read_score("0") == 0.0);
    CHECK(read_score("-12") == -12.0);
    CHECK(read_score("1.5e3") == 1500.0);
    // Not the nearest: what the library writes again after it has read these.
    CHECK(read_score("-12.403156558796367") == -12.403156558796368);
    CHECK(read_score("-13.110709918738813") == -13.110709918738811);
    CHECK(read_score("-2.1364900028337486") == -2.136490002833749);
    CHECK(read_score("1e-400") == 0.0);
    CHECK_THROWS_AS(read_score("1e999"), FileError);
}
