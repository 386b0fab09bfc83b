// What makes tokens of the pieces of a text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace hywu::text {

// A text has something that the vocabulary has no token for; what() is a clause.
class UnknownToken : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class Model {
public:
    virtual ~Model() = default;
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // Appends the token ids of a piece (valid UTF-8, not empty). Throws UnknownToken.
    virtual void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const = 0;
    virtual std::optional<std::uint32_t> token_to_id(std::string_view token) const = 0;
    virtual std::size_t vocabulary_size() const noexcept = 0;

protected:
    Model() = default;
};

}  // namespace hywu::text
