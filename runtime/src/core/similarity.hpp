// The nearest of several names, for messages.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace hywu::core {

// What Python's difflib.get_close_matches(word, candidates, 1, 0.5) gives: the candidate with the largest
// ratio of matching characters (Ratcliff and Obershelp, "Pattern Matching: The Gestalt Approach", 1988), if
// it is at least 0.5. The strings are UTF-8.
std::optional<std::string> nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace hywu::core
