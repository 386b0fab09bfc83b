// The editor: photographs and instructions in, pictures or deltas out. As hywu_runtime.editor.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backends/registry.hpp"
#include "core/bundle.hpp"
#include "core/deltas.hpp"
#include "core/schedule.hpp"
#include "runtime/choice.hpp"
#include "runtime/program.hpp"
#include "text/prompt_encoder.hpp"

namespace hywu::runtime {

// RGB pixels that somebody else holds: rows of 3 * width bytes, `stride` bytes apart.
struct Photo {
    const std::uint8_t* data = nullptr;
    std::int64_t width = 0, height = 0;
    std::size_t stride = 0;
};

struct Size {
    std::int64_t width = 0, height = 0;
};

// What a batch of requests says. Vectors have one entry for each sample, or a single one for all where this
// is said.
struct EditOptions {
    std::size_t count = 1;
    std::vector<Photo>
        photos;  // for each sample, as many as Limits::photos, or none where nothing needs them
    std::vector<std::string> prompts, negative_prompts;  // for each sample; none: empty texts
    std::uint64_t seed = 0;                              // gives each sample noise of its own
    std::vector<std::uint64_t> seeds;  // for each sample: what this seed alone gives; none: `seed`
    std::vector<std::pair<std::string, std::vector<double>>>
        guidance;                           // one for all, or for each; others have their default
    std::vector<double> strengths = {1.0};  // one for all, or for each
    std::vector<const core::Deltas*>
        deltas;  // none: generate; one set for all or for the batch; or one for each sample
    std::optional<std::string> sampler;
    std::optional<std::int64_t> steps;
    std::optional<double> strength;  // the part of the steps to run, where edits start from the photo
    std::optional<Size> size;
    std::optional<View> noise, latents;  // floats [evaluations, batch, …]; [batch, …]
    NamedViews inputs;
    std::function<void(std::size_t, std::size_t)> progress;
    std::function<bool()> cancelled;
};

struct GenerateOptions {
    std::vector<Photo> photos;  // as many as Limits::photos, or none where nothing needs them
    std::string prompt;
    std::optional<Size> size;
    NamedViews inputs;
    std::function<bool()> cancelled;
};

struct RunOptions {
    NamedViews inputs;
    std::vector<std::string> outputs;         // none: all that the bundle names
    std::vector<double> strengths = {1.0};    // one for all, or for each sample
    std::vector<const core::Deltas*> deltas;  // as in EditOptions
    std::function<bool()> cancelled;
};

// What an editor accepts: of the bundle's limits, what its engines cover if it runs on engines. `size` is
// that of the newest of them; `guidance`: name and default; `photos`: how many each sample has.
struct Limits {
    std::int64_t batch_min = 1, batch_max = 1;
    std::optional<core::ImagePolicy> size;
    std::vector<std::pair<std::string, std::vector<std::int64_t>>> steps;  // by sampler, the default first
    std::int64_t default_steps = 0;                                        // 0: no schedule
    double default_strength = 0;                                           // 0: edits start from noise
    std::vector<std::pair<std::string, double>> guidance;
    std::int64_t rank = 0;
    std::size_t photos = 1;
    bool edits = false, generates = false;
};

// A bundle and what its editors share. For several threads.
struct SharedBundle {
    std::shared_ptr<const core::Bundle> bundle;
    std::shared_ptr<SessionPool> sessions;
};

struct EditorOptions : Wish {
    bool low_memory = false;
};

// An opened bundle on a backend. Several threads may call one editor: it serves them one after another. After
// a call returns, or throws, it holds nothing of the request.
class Editor {
public:
    // Throws Error(bundle, device, engine, input).
    Editor(SharedBundle shared, const EditorOptions& options);
    // On a given backend: `sharing` says in words with whom sessions are shared. Throws as the other.
    Editor(SharedBundle shared, std::shared_ptr<backends::Backend> backend, const std::string& sharing,
           const EditorOptions& options);

    // Where the pictures go: called once, before anything runs, with their shape [count, height, width, 3];
    // it gives memory for as many bytes, which is written if all goes well.
    using Place = std::function<void*(const core::Shape&)>;
    // Edits photographs in one batch.
    // Throws Error(input, delta, cancelled, unsupported, bundle, engine, device), and what callbacks throw.
    void edit(const EditOptions& options, const Place& place);
    // The deltas that an edit would use. Throws as edit().
    core::Deltas generate(const GenerateOptions& options);
    // What a module that is no image editor makes of tensors, in the order of the outputs. Throws as edit().
    std::vector<std::pair<std::string, core::Array>> run(const RunOptions& options);
    // Loads what a default request needs, and runs one on a gray photo if no input is missing.
    void warm_up();

    const Limits& limits() const noexcept { return limits_; }
    const core::Bundle& bundle() const noexcept { return *shared_.bundle; }
    std::string backend() const { return std::string(backend_->name()); }
    // Throws Error(input) if the bundle does not take this many samples.
    void check_batch(std::size_t count) const;
    // The size at which a photo is edited alone, or in the smallest batch. Throws Error(input).
    Size working_size(std::int64_t width, std::int64_t height, const std::optional<Size>& wanted = {}) const;

    Timings timings();
    struct Memory {
        std::size_t buffers = 0, constants = 0, graphs = 0, shared = 0;
    };
    Memory memory();

private:
    struct Samples;

    Editor(SharedBundle shared, Choice choice, const std::string& sharing, const EditorOptions& options);
    void set_limits();
    // How a photo's size is chosen: within the newest engine that takes the batch.
    std::optional<core::ImagePolicy> policy(std::int64_t batch) const;
    Size working_size(std::int64_t width, std::int64_t height, const std::optional<Size>& wanted,
                      const std::optional<core::ImagePolicy>& policy) const;
    // The size that the newest engine is tuned for, or a small one.
    Size warm_up_size() const;
    Samples samples(std::size_t count, const std::vector<Photo>& photos,
                    const std::optional<Size>& size) const;
    // The batch of tensors that the caller gives.
    std::size_t batch_of(const NamedViews& inputs) const;
    std::map<std::string, std::vector<double>> scales(const EditOptions& options) const;
    // Tensors that the caller gives by name: no deltas, and nothing that changes from step to step.
    NamedViews given(const NamedViews& inputs, const std::optional<View>& latents,
                     std::vector<core::Array>& kept) const;
    core::Deltas checked(const std::vector<const core::Deltas*>& deltas, std::size_t batch) const;
    void add_absent(const Plan& plan, const std::vector<double>& strengths, NamedViews& given,
                    std::vector<core::Array>& kept) const;
    // Gathers the provided tensors of a plan and runs it.
    void run(const Plan& plan, const Samples& samples, const NamedViews& given,
             const std::optional<core::Rows>& rows, std::vector<std::string> finite,
             const EditOptions& options, const std::function<void(const Axes&)>& ready,
             const std::function<void(const std::string&, backends::DeviceTensor&)>& result);
    core::Array value(const std::string& name, const Samples& samples,
                      const std::optional<core::Rows>& rows) const;
    core::Array encode(const std::string& text, const Samples& samples, bool mask, core::Dtype dtype) const;
    StepInput step_noise(const std::string& name, const core::Shape& shape, const Samples& samples,
                         const std::optional<core::Rows>& rows, const std::optional<core::Array>& noise,
                         std::vector<core::Array>& kept) const;

    // Serves one call at a time. Throws Error(input) where this thread is within a call already (a callback).
    class Turn;

    const SharedBundle shared_;
    const core::Manifest& manifest_;
    const std::shared_ptr<backends::Backend> backend_;
    const std::vector<std::string> engines_;  // that may serve requests, the newest first
    std::map<std::string, std::unique_ptr<text::PromptEncoder>> encoders_;
    std::optional<core::Schedule> schedule_;
    Limits limits_;
    Executor executor_;
    std::mutex mutex_;
    std::atomic<std::thread::id> owner_{};
};

}  // namespace hywu::runtime
