// What the picture code makes of pictures, for the comparison with Pillow in tests/cpp.
//
//     hywu_image_pixels resize W H W2 H2 [bicubic]   RGB on standard input, RGB on standard output
//     hywu_image_pixels sizes W H MULTIPLE AREA MIN_AREA MAX_AREA   of one step; 0: none
//     hywu_image_pixels white                        RGBA on standard input, RGB on standard output
//     hywu_image_pixels size W H MULTIPLE MIN MAX AREA [W2 H2]   below 0: small photos are enlarged
//     hywu_image_pixels read FILE [W H]              "width height", a line feed, RGB; W H: the target
//     hywu_image_pixels write FILE W H               RGB on standard input
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#include "core/error.hpp"
#include "core/files.hpp"
#include "image_file.hpp"
#include "images/resize.hpp"

namespace {

std::vector<std::uint8_t> input() {
    return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

void output(const std::vector<std::uint8_t>& bytes) { std::fwrite(bytes.data(), 1, bytes.size(), stdout); }

int run(const std::vector<std::string>& arguments) {
    using namespace hywu;
    const auto number = [&](std::size_t i) { return std::stoi(arguments.at(i)); };
    const std::string& verb = arguments.at(1);
    if (verb == "resize") {
        const std::vector<std::uint8_t> pixels = input();
        if (pixels.size() !=
            std::size_t{3} * static_cast<std::size_t>(number(2)) * static_cast<std::size_t>(number(3)))
            return 2;
        const auto filter = arguments.size() > 6 ? core::Filter::bicubic : core::Filter::lanczos;
        output(images::resize(pixels.data(), number(2), number(3), number(4), number(5), filter));
    } else if (verb == "sizes") {
        core::Resize step;
        step.multiple = number(4);
        const auto area = [&](std::size_t i) {
            return number(i) == 0 ? std::optional<std::int64_t>() : number(i);
        };
        step.area = area(5);
        step.min_area = area(6);
        step.max_area = area(7);
        const auto [width, height] = images::resized_sizes({step}, number(2), number(3)).at(0);
        std::printf("%d %d\n", width, height);
    } else if (verb == "white") {
        const std::vector<std::uint8_t> pixels = input();
        output(images::composite_on_white(pixels.data(), pixels.size() / 4));
    } else if (verb == "size") {
        core::ImagePolicy policy;
        policy.multiple = number(4);
        policy.min = number(5);
        policy.max = number(6);
        policy.default_area = std::stoll(arguments.at(7));
        policy.enlarge = policy.default_area < 0;  // written as a negative area
        policy.default_area = std::abs(policy.default_area);
        std::optional<images::Size> size;
        if (arguments.size() == 10) size = {number(8), number(9)};
        // Three numbers or more: the sizes that the policy offers, after their number.
        for (std::size_t i = 9; arguments.size() > 10 && i + 1 < arguments.size(); i += 2)
            policy.sizes.push_back({std::stoll(arguments.at(i)), std::stoll(arguments.at(i + 1))});
        const auto [width, height] = images::working_size(policy, number(2), number(3), size);
        std::printf("%d %d\n", width, height);
    } else if (verb == "read") {
        tools::Target target;
        if (arguments.size() > 4) target = [&](int, int) { return std::pair(number(3), number(4)); };
        const tools::Image image = tools::read_image(core::path_of(arguments.at(2)), target);
        std::printf("%d %d\n", image.width, image.height);
        output(image.pixels);
    } else if (verb == "write") {
        tools::write_image(core::path_of(arguments.at(2)), {number(3), number(4), input()});
    } else {
        return 2;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    try {
        return run({argv, argv + argc});
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
