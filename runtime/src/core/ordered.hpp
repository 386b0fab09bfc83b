// A map that remembers the order of its entries, as JSON objects and Python's dict do.
#pragma once

#include <cstddef>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hywu::core {

// Look-ups take logarithmic time whatever the keys are (a hash table would not on hostile ones).
template <class T>
class Ordered {
public:
    using value_type = std::pair<std::string, T>;
    using const_iterator = typename std::vector<value_type>::const_iterator;

    const_iterator begin() const noexcept { return entries_.begin(); }
    const_iterator end() const noexcept { return entries_.end(); }
    std::size_t size() const noexcept { return entries_.size(); }
    bool empty() const noexcept { return entries_.empty(); }

    bool contains(std::string_view key) const { return index_.find(key) != index_.end(); }
    // The value, or null.
    const T* find(std::string_view key) const {
        const auto found = index_.find(key);
        return found == index_.end() ? nullptr : &entries_[found->second].second;
    }
    // The value. Throws std::out_of_range if there is none.
    const T& at(std::string_view key) const {
        if (const T* value = find(key)) return *value;
        throw std::out_of_range("no entry " + std::string(key));
    }
    // Appends an entry; gives false, and changes nothing, if the key is there.
    bool add(std::string key, T value) {
        if (!index_.emplace(key, entries_.size()).second) return false;
        entries_.emplace_back(std::move(key), std::move(value));
        return true;
    }

private:
    std::vector<value_type> entries_;
    std::map<std::string, std::size_t, std::less<>> index_;
};

}  // namespace hywu::core
