// Edits one picture with two strengths, and a batch of two, with the C++ wrapper. Pictures are binary PPM
// files (P6).
//
//     cmake -B build -DCMAKE_PREFIX_PATH=/where/hywu/is/installed && cmake --build build
//     build/edit BUNDLE photo.ppm "make it sepia" out
#include <hywu/hywu.hpp>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace {

struct Picture {
    std::int32_t width = 0, height = 0;
    std::vector<std::uint8_t> rgb;
};

Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    int most = 0;
    Picture picture;
    file >> magic >> picture.width >> picture.height >> most;
    file.get();
    if (!file || magic != "P6" || most != 255 || picture.width < 1 || picture.height < 1) {
        throw std::runtime_error(path + " is not a binary PPM picture");
    }
    picture.rgb.resize(static_cast<std::size_t>(picture.width) * static_cast<std::size_t>(picture.height) *
                       3);
    file.read(reinterpret_cast<char*>(picture.rgb.data()), static_cast<std::streamsize>(picture.rgb.size()));
    if (!file) throw std::runtime_error(path + " is cut short");
    return picture;
}

void write_ppm(const std::string& path, hywu::Pixels picture) {
    std::ofstream file(path, std::ios::binary);
    const auto bytes = picture.bytes();
    file << "P6\n" << picture.width << ' ' << picture.height << "\n255\n";
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) throw std::runtime_error(path + " cannot be written");
    std::cout << path << '\n';
}

}  // namespace

int main(int count, char** values) try {
    if (count != 5) {
        std::cerr << "Usage: " << values[0] << " BUNDLE PHOTO.ppm PROMPT OUT\n";
        return 2;
    }
    const Picture picture = read_ppm(values[2]);
    const hywu::Pixels photo(picture.rgb.data(), picture.width, picture.height);
    const std::string out = values[4];

    const hywu::Bundle bundle = hywu::Bundle::open(values[1]);
    hywu::Editor editor = hywu::Editor::create(bundle);

    // Deltas are generated once, and used with two strengths.
    const hywu::Deltas deltas = editor.generate(photo, values[3]);
    hywu::EditOptions options;
    options.seed = 42;
    options.deltas = {&deltas};
    for (const double strength : {1.0, 0.5}) {
        options.delta_strength = {strength};
        write_ppm(out + (strength == 1.0 ? "-full.ppm" : "-half.ppm"),
                  editor.edit(photo, values[3], options)[0]);
    }

    // A batch in which every sample has deltas of its own.
    const std::vector<hywu::Sample> samples = {{photo, values[3]}, {photo, "make it darker"}};
    options = {};
    options.progress = [](std::int32_t done, std::int32_t total) {
        std::cerr << done << '/' << total << '\n';
    };
    const hywu::Images images = editor.edit(samples, options);
    for (std::size_t i = 0; i < images.size(); ++i)
        write_ppm(out + "-" + std::to_string(i) + ".ppm", images[i]);
    return 0;
} catch (const hywu::Error& error) {
    std::cerr << error.what() << '\n';
    return error.status() == hywu::Status::cancelled ? 130 : 1;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
