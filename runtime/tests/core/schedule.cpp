#include "core/schedule.hpp"

#include <cmath>
#include <nlohmann/json.hpp>

#include "scratch.hpp"

using namespace hywu::core;
using json = nlohmann::ordered_json;

namespace {

template <class T>
std::string bytes(const std::vector<T>& numbers) {
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T)};
}

struct Tables {
    std::vector<std::int64_t> offsets = {0, 0, 2, 5, 5};  // 1 and 2 steps with 2 and 3 rows
    std::vector<float> timesteps = {1, 2, 3, 4, 5};
    std::vector<float> coefficients = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    std::vector<float> initial_scale = {0, 1, 2, 3};
    std::vector<float> start = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
};

std::filesystem::path write(const Scratch& scratch, const Tables& tables) {
    json head = json::object();
    std::string data;
    const auto add = [&](const std::string& name, const std::string& dtype, const json& shape,
                         const std::string& raw) {
        head["s." + name] = {
            {"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + raw.size()}}};
        data += raw;
    };
    add("offsets", "I64", {tables.offsets.size()}, bytes(tables.offsets));
    add("timesteps", "F32", {tables.timesteps.size()}, bytes(tables.timesteps));
    add("coefficients", "F32", {tables.coefficients.size() / 2, 2}, bytes(tables.coefficients));
    add("initial_scale", "F32", {tables.initial_scale.size()}, bytes(tables.initial_scale));
    add("start", "F32", {tables.start.size() / 2, 2}, bytes(tables.start));
    const std::string text = head.dump();
    std::string size;
    for (int shift = 0; shift < 64; shift += 8) size += static_cast<char>(text.size() >> shift & 0xff);
    return scratch.write("s.safetensors", size + text + data);
}

Schedules section(std::optional<std::int64_t> order = {}) {
    Schedules result;
    result.default_sampler = "s";
    result.default_steps = 9;
    result.samplers.add("s", {"S", {1, 2}, false, order});
    return result;
}

Schedules midway(double strength, std::optional<std::int64_t> order) {
    Schedules result = section(order);
    result.strength = Strength{strength};
    return result;
}

}  // namespace

TEST_CASE("rows of a schedule") {
    const Scratch scratch;
    const Schedule schedule(write(scratch, {}), section());
    CHECK(schedule.width() == 2);
    CHECK(schedule.accepted("s") == std::vector<std::int64_t>{1, 2});
    CHECK(schedule.accepted("ghost").empty());
    const Rows rows = schedule.rows();  // the nearest to the default
    CHECK(rows.steps == 2);
    CHECK(rows.sampler == "s");
    CHECK(rows.size() == 3);
    CHECK(rows.timesteps == std::vector<float>{3, 4, 5});
    CHECK(rows.row(2)[1] == 10);
    CHECK(rows.initial_scale == 2);
    CHECK(schedule.rows("s", 1).coefficients == std::vector<float>{1, 2, 3, 4});
    for (const std::int64_t steps :
         {std::int64_t{0}, std::int64_t{-1}, std::int64_t{3}, INT64_MAX, INT64_MIN}) {
        check_error(ErrorKind::input, "It takes 1 to 2", [&] { schedule.rows("s", steps); });
    }
    check_error(ErrorKind::input, "no sampler 'ghost'", [&] { schedule.rows("ghost"); });
    CHECK(ranges({1, 2, 3, 7, 9, 10}) == "1 to 3, 7, 9 to 10");
    CHECK(ranges({}) == "no number of steps");
}

TEST_CASE("requests that start midway") {
    const Scratch scratch;
    const auto path = write(scratch, {});
    const Schedule schedule(path, midway(0.5, 1));
    CHECK(schedule.rows().timesteps == std::vector<float>{4, 5});  // one of the two steps is left out
    CHECK(schedule.rows().start == std::vector<float>{7, 8});
    CHECK(schedule.rows("s", 2, 1.0).start == std::vector<float>{5, 6});
    CHECK(schedule.rows("s", 2, 0.51).size() == 3);  // 0.98 of a step is none
    CHECK(schedule.rows("s", 1).size() == 2);
    CHECK(Schedule(path, midway(0.5, 2)).rows().start == std::vector<float>{9, 10});
    for (const double strength : {0.0, -1.0, 1.1, std::nan("")}) {
        check_error(ErrorKind::input, "`strength` is", [&] { schedule.rows("s", 2, strength); });
    }
    check_error(ErrorKind::input, "No step is left of 2", [&] { Schedule(path, midway(0.5, 2)).rows("s", 2, 1e-17); });
    check_error(ErrorKind::input, "cannot start midway",
                [&] { Schedule(path, midway(1, {})).rows("s", 2, 0.5); });
    CHECK(Schedule(path, midway(1, {})).rows("s", 2, 1.0).start == std::vector<float>{5, 6});
    CHECK(Schedule(path, section()).rows().start.empty());
    check_error(ErrorKind::input, "starts every edit from noise",
                [&] { Schedule(path, section()).rows("s", 2, 0.5); });
    Tables short_of_one;
    short_of_one.start.resize(8);
    const auto damaged = write(scratch, short_of_one);
    check_error(ErrorKind::bundle, "inconsistent", [&] { Schedule(damaged, midway(1, 1)); });
}

TEST_CASE("schedules that are damaged") {
    const Scratch scratch;
    const auto refused = [&](const Tables& tables, const char* word) {
        const auto path = write(scratch, tables);
        check_error(ErrorKind::bundle, word, [&] { Schedule(path, section()); });
    };
    Tables tables;
    tables.offsets = {0, 0, 5, 2, 5};
    refused(tables, "inconsistent");
    tables.offsets = {0, INT64_MAX, INT64_MIN, -1, 5};
    refused(tables, "inconsistent");
    tables.offsets = {1, 1, 2, 5, 5};
    refused(tables, "inconsistent");
    tables.offsets = {0, 0, 2, 5};
    refused(tables, "inconsistent");
    tables = {};
    tables.timesteps.pop_back();
    refused(tables, "inconsistent");
    tables = {};
    tables.coefficients[3] = std::nanf("");
    refused(tables, "not finite");
    check_error(ErrorKind::bundle, "s.timesteps", [&] {
        Schedules other = section();
        const std::string whole = contents(write(scratch, {}));
        std::string damaged = whole;
        damaged[damaged.find("timesteps")] = 'T';
        Schedule(scratch.write("s.safetensors", damaged), other);
    });
    const std::string whole = contents(write(scratch, {}));
    for (std::size_t length = 0; length < whole.size(); ++length) {
        const auto path = scratch.write("s.safetensors", whole.substr(0, length));
        check_error(ErrorKind::bundle, "cannot be read", [&] { Schedule(path, section()); });
    }
    check_error(ErrorKind::bundle, "cannot be read", [&] { Schedule(scratch.path() / "ghost", section()); });
}
