#include "text/post_processors.hpp"

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

namespace {

constexpr std::string_view where = "post_processor";
// A template of a hostile file may repeat a text very often.
constexpr std::size_t max_pieces = 64;

// It changes offsets, which nobody asks for here.
class ByteLevel : public PostProcessor {
public:
    std::size_t added() const override { return 0; }
    std::size_t sequences(std::size_t count) const override { return count; }
    std::vector<Ids> process(std::vector<Ids> all) const override { return all; }
};

// [CLS] A [SEP], and further sequences B [SEP]; RoBERTa's have </s> on both sides.
class Bert : public PostProcessor {
public:
    Bert(const core::Json& description, bool roberta)
        : first_(special(description, "cls")), last_(special(description, "sep")), roberta_(roberta) {}
    std::size_t added() const override { return 2; }
    std::size_t sequences(std::size_t count) const override { return count; }
    std::vector<Ids> process(std::vector<Ids> all) const override {
        for (std::size_t i = 0; i < all.size(); ++i) {
            if (i == 0 || roberta_) all[i].insert(all[i].begin(), i == 0 ? first_ : last_);
            all[i].push_back(last_);
        }
        return all;
    }

private:
    static std::uint32_t special(const core::Json& description, std::string_view key) {
        const core::Json::Items& pair = array_member(description, key, where);
        if (pair.size() != 2 || !pair[0].string()) {
            throw FileError("post_processor." + std::string(key) + " is not a token with its id");
        }
        return id_of(pair[1], "an id of post_processor");
    }

    std::uint32_t first_, last_;
    bool roberta_;
};

class Template : public PostProcessor {
public:
    explicit Template(const core::Json& description) {
        std::map<std::string, Ids, std::less<>> specials;
        const core::Json& tokens = member(description, "special_tokens", where);
        if (!tokens.members()) throw FileError("post_processor.special_tokens is not an object");
        for (const auto& [name, token] : *tokens.members()) {
            Ids ids;
            for (const core::Json& id : array_member(token, "ids", "a special token of post_processor")) {
                ids.push_back(id_of(id, "an id of post_processor"));
            }
            specials.insert_or_assign(name, std::move(ids));
        }
        for (const std::string_view key : {"single", "pair"}) {
            std::vector<Part>& parts = key == "single" ? single_ : pair_;
            for (const core::Json& piece : array_member(description, key, where)) {
                parts.push_back(part(piece, specials));
            }
            if (parts.size() > max_pieces)
                throw UnsupportedTokenizer("its post_processor has more than 64 pieces");
        }
        for (const Part& part : single_) added_ += part.ids.size();
    }
    std::size_t added() const override { return added_; }
    std::size_t sequences(std::size_t count) const override {
        if (count < 1 || count > 2) {
            throw UnsupportedTokenizer("its post_processor applies a template to " + std::to_string(count) +
                                       " sequences");
        }
        for (const Part& part : parts(count)) {
            if (part.sequence && *part.sequence >= count) {
                throw UnsupportedTokenizer("its post_processor wants a second text");
            }
        }
        return parts(count).size();
    }
    std::vector<Ids> process(std::vector<Ids> all) const override {
        std::vector<Ids> result;
        for (const Part& part : parts(all.size())) {
            result.push_back(part.sequence ? all[*part.sequence] : part.ids);
        }
        return result;
    }

private:
    // One of the sequences, or special tokens.
    struct Part {
        std::optional<std::size_t> sequence;
        Ids ids;
    };

    const std::vector<Part>& parts(std::size_t count) const { return count == 1 ? single_ : pair_; }

    static Part part(const core::Json& piece, const std::map<std::string, Ids, std::less<>>& specials) {
        if (const core::Json* sequence = piece.member("Sequence")) {
            const std::string& name = string_member(*sequence, "id", "a piece of post_processor");
            if (name != "A" && name != "B") throw FileError("a piece of post_processor is neither A nor B");
            return {name == "A" ? 0U : 1U, {}};
        }
        const core::Json& special = member(piece, "SpecialToken", "a piece of post_processor");
        const std::string& name = string_member(special, "id", "a piece of post_processor");
        const auto found = specials.find(name);
        if (found == specials.end()) {
            throw FileError("the token " + core::show(name) +
                            " of post_processor is not in its special_tokens");
        }
        return {{}, found->second};
    }

    std::vector<Part> single_, pair_;
    std::size_t added_ = 0;
};

class Sequence : public PostProcessor {
public:
    explicit Sequence(const core::Json& description) {
        for (const core::Json& item : array_member(description, "processors", where)) {
            items_.push_back(make_post_processor(item));
        }
    }
    std::size_t added() const override {
        std::size_t sum = 0;
        for (const auto& item : items_) sum += item->added();
        return sum;
    }
    std::size_t sequences(std::size_t count) const override {
        for (const auto& item : items_) count = item->sequences(count);
        return count;
    }
    std::vector<Ids> process(std::vector<Ids> all) const override {
        for (const auto& item : items_) all = item->process(std::move(all));
        return all;
    }

private:
    std::vector<std::unique_ptr<PostProcessor>> items_;
};

}  // namespace

std::unique_ptr<PostProcessor> make_post_processor(const core::Json& description) {
    const std::string& type = type_of(description, where);
    if (type == "ByteLevel") return std::make_unique<ByteLevel>();
    if (type == "BertProcessing") return std::make_unique<Bert>(description, false);
    if (type == "RobertaProcessing") return std::make_unique<Bert>(description, true);
    if (type == "TemplateProcessing") return std::make_unique<Template>(description);
    if (type == "Sequence") return std::make_unique<Sequence>(description);
    throw UnsupportedTokenizer("its post_processor is of the type " + core::show(type));
}

}  // namespace hywu::text
