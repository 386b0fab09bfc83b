// The special tokens around a text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/json.hpp"

namespace hywu::text {

using Ids = std::vector<std::uint32_t>;

inline constexpr std::size_t max_special_tokens = 1 << 16;

class PostProcessor {
public:
    virtual ~PostProcessor() = default;
    PostProcessor(const PostProcessor&) = delete;
    PostProcessor& operator=(const PostProcessor&) = delete;

    // How many tokens it adds, for which truncation leaves room.
    virtual std::size_t added() const = 0;
    // What becomes of `count` sequences of tokens. Throws UnsupportedTokenizer if it takes no such number.
    virtual std::size_t sequences(std::size_t count) const = 0;
    virtual std::vector<Ids> process(std::vector<Ids> sequences) const = 0;

protected:
    PostProcessor() = default;
};

// The post-processor of a tokenizer file: TemplateProcessing, RobertaProcessing, BertProcessing, ByteLevel,
// or a Sequence of these. Throws FileError, UnsupportedTokenizer.
std::unique_ptr<PostProcessor> make_post_processor(const core::Json& description);

}  // namespace hywu::text
