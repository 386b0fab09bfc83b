#include "runtime/choice.hpp"

#include <algorithm>
#include <utility>

#include "core/engines.hpp"
#include "core/error.hpp"
#include "core/log.hpp"

namespace hywu::runtime {

using core::Error;
using core::ErrorKind;

namespace {

// Where an engine is asked for, what it is for is asked for with it.
void settle(const core::Manifest& manifest, Wish& wish) {
    if (!wish.engine) return;
    core::check_key(manifest, *wish.engine);
    const core::Engine& engine = manifest.engines.at(*wish.engine);
    const std::string backend(core::name(engine.backend));
    const auto check = [&](const std::string& what, const std::string& asked, const std::string& own) {
        if (asked == own) return;
        throw Error(ErrorKind::input,
                    "Engine " + *wish.engine + " is for " + what + " " + own + ", not " + asked,
                    "Expected `" + what + "` " + (own == "none" ? "to be left out" : own) + " beside it",
                    "Leave one of the two out");
    };
    if (wish.backend != "auto") check("backend", wish.backend, backend);
    if (wish.variant) check("variant", *wish.variant, engine.variant.value_or("none"));
    wish.backend = backend;
    wish.variant = engine.variant;
}

Choice with_engines(const core::Bundle& bundle, const Wish& wish,
                    std::shared_ptr<backends::Backend> backend) {
    const std::optional<core::Target> target = backend->target();
    if (!target) return {std::move(backend), wish.variant, {}};
    std::vector<std::string> keys =
        core::usable(bundle.root(), bundle.manifest(), *target, wish.variant, wish.engine);
    core::log(core::LogLevel::info,
              "backend " + target->backend + " chosen on " + target->device + ", engine " + keys[0]);
    return {std::move(backend), wish.variant, std::move(keys)};
}

void pass_over(core::LogLevel level, const std::string& backend, const std::string& reason) {
    core::log(level, "engines of " + backend + " are passed over: " + reason);
}

}  // namespace

Choice choose(const core::Bundle& bundle, Wish wish, const std::vector<backends::Entry>& among) {
    settle(bundle.manifest(), wish);
    backends::check_options(wish.device);
    for (const backends::Entry& entry : among) {
        if (wish.backend != "auto" || !backends::is_compiled(entry.name)) continue;
        const auto& engines = bundle.manifest().engines;
        if (std::none_of(engines.begin(), engines.end(), [&](const auto& item) {
                return core::name(item.second.backend) == entry.name && item.second.variant == wish.variant;
            }))
            continue;
        if (const auto reason = entry.missing()) {
            pass_over(core::LogLevel::info, entry.name, *reason);
            continue;
        }
        try {
            return with_engines(bundle, wish, entry.create(wish.device));
        } catch (const Error& error) {
            if (error.kind() != ErrorKind::device && error.kind() != ErrorKind::engine) throw;
            pass_over(core::LogLevel::warning, entry.name, error.what());
        }
    }
    return with_engines(bundle, wish, backends::create_backend(wish.backend, wish.device, among));
}

Choice choose(const core::Bundle& bundle, Wish wish, std::shared_ptr<backends::Backend> backend) {
    if (wish.backend == "auto") wish.backend = backend->name();
    settle(bundle.manifest(), wish);
    return with_engines(bundle, wish, std::move(backend));
}

}  // namespace hywu::runtime
