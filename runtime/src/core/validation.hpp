// What makes a manifest consistent: references, axes, and the data flow of its program.
#pragma once

#include "core/manifest.hpp"

namespace hywu::core {

// Checks a manifest whose types are already right, and fills in `signatures`. Every reference costs one
// look-up: time is n log n in the size of the manifest, whatever it says. Throws Error(bundle), naming the
// first key that is wrong.
void validate(Manifest& manifest);

}  // namespace hywu::core
