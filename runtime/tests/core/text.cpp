#include "core/text.hpp"

#include "core/error.hpp"
#include "core/json.hpp"
#include "core/sha256.hpp"
#include "core/similarity.hpp"
#include "scratch.hpp"

using namespace hywu::core;

TEST_CASE("strings are shown as Python's ascii() writes them") {
    CHECK(show("plain") == "'plain'");
    CHECK(show("it's") == "\"it's\"");
    CHECK(show("'\"") == R"('\'"')");
    CHECK(show("a\tb\n\\\x01\x7f") == R"('a\tb\n\\\x01\x7f')");
    CHECK(show("é€😀") == R"('\xe9\u20ac\U0001f600')");
    CHECK(show("\xff\xc0\x80\xed\xa0\x80") == R"('\xff\xc0\x80\xed\xa0\x80')");
    CHECK(show(std::string(100, 'x')) == "'" + std::string(58, 'x') + "…");
    CHECK(show(std::string(58, 'x')) == "'" + std::string(58, 'x') + "'");
    CHECK(show(std::string(59, 'x')).size() == 59 + std::string_view("…").size());
    CHECK(repr("é\u2028") == "'é\\u2028'");
    CHECK(inside("'aé…") == "aé");
    CHECK(inside("x").empty());
}

TEST_CASE("numbers are shown as Python's repr() writes them") {
    CHECK(repr(1.0) == "1.0");
    CHECK(repr(-0.0) == "-0.0");
    CHECK(repr(0.1) == "0.1");
    CHECK(repr(1e16) == "1e+16");
    CHECK(repr(123456789012345680.0) == "1.2345678901234568e+17");
    CHECK(repr(1234567890123456.0) == "1234567890123456.0");
    CHECK(repr(0.0001) == "0.0001");
    CHECK(repr(0.00001) == "1e-05");
    CHECK(repr(5e-324) == "5e-324");
    CHECK(repr(std::vector<std::int64_t>{1, -2}) == "[1, -2]");
    CHECK(repr(std::vector<std::string>{"a", "b'"}) == "['a', \"b'\"]");
}

TEST_CASE("UTF-8") {
    CHECK(is_utf8("aé€😀"));
    for (const char* bad :
         {"\x80", "\xc1\xbf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf8", "\xe2\x82"}) {
        CHECK_FALSE(is_utf8(bad));
    }
    CHECK(length("aé€😀") == 4);
    std::string back;
    for (const char32_t c : to_utf32("aé€😀")) append_utf8(back, c);
    CHECK(back == "aé€😀");
    CHECK(is_printable("aé 字"));
    for (const char* bad : {"\n", "\u00a0", "\u00ad", "\u2028", "\ue000", "\U000e0001", "\xff"}) {
        CHECK_FALSE(is_printable(bad));
    }
}

TEST_CASE("an error's text is its three sentences") {
    const Error error(ErrorKind::delta, " one.. ", "", "three");
    CHECK(std::string(error.what()) == "one. three.");
    CHECK(name(error.kind()) == "DeltaError");
}

TEST_CASE("the nearest name") {
    CHECK(nearest("block.to_q", {"blocks.to_q", "block.to_k", "other"}) == "blocks.to_q");
    CHECK(nearest("ab", {"xy"}) == std::nullopt);
    CHECK(nearest("", {""}) == "");
    CHECK(nearest("a", {}) == std::nullopt);
}

TEST_CASE("SHA-256: vectors of FIPS 180-4 and NIST") {
    CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    Sha256 million;
    for (int i = 0; i < 1000; ++i) million.update(std::string(1000, 'a').data(), 1000);
    CHECK(million.hex() == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("JSON is read strictly") {
    const Json value = Json::parse(R"({"b": [1, 1.5, "x", null, true], "a": 18446744073709551616})");
    REQUIRE(value.members());
    CHECK((*value.members())[0].first == "b");
    const Json::Items& items = *value.member("b")->items();
    CHECK(*items[0].integer() == 1);
    CHECK(*items[1].real() == 1.5);
    CHECK(*items[2].string() == "x");
    CHECK(items[3].is_null());
    CHECK(*items[4].boolean());
    CHECK(value.member("a")->big_integer()->digits == "18446744073709551616");
    CHECK(value.member("c") == nullptr);
    using namespace std::string_view_literals;
    for (const auto bad :
         {""sv, "{"sv, "[1,]"sv, "NaN"sv, "1e999"sv, "{\"a\":1,\"\\u0061\":1}"sv, "\xef\xbb\xbf{}"sv,
          "{}\0x"sv, "\"\\ud800\""sv, "\"\xff\""sv, "01"sv, "{} {}"sv, "// comment\n{}"sv, "\"\n\""sv}) {
        CHECK_THROWS_AS(Json::parse(bad), JsonError);
    }
    CHECK_NOTHROW(Json::parse(std::string(Json::max_depth, '[') + std::string(Json::max_depth, ']')));
    CHECK_THROWS_AS(Json::parse(std::string(Json::max_depth + 1, '[')), JsonError);
    CHECK_THROWS_AS(Json::parse(std::string(10'000'000, '[')), JsonError);
    try {
        Json::parse("{\"a\": \"" + std::string(1'000'000, 'x') + "\xff\"}");
        FAIL("must throw");
    } catch (const JsonError& error) {
        CHECK(std::string_view(error.what()).size() < 200);
        CHECK(is_utf8(error.what()));
    }
}
