"""The headers as a user meets them: the examples at their heads and those in their folder, compile, run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native import Library
from PIL import Image

from hywu_runtime import Editor

RUNTIME = Path(__file__).parents[2] / "runtime"
INCLUDE = RUNTIME / "include"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]

CALL_C = """
int main(int count, char** values) {
    static uint8_t rgb[64 * 64 * 3];
    (void)count;
    return edit(values[1], rgb, 64, 64);
}
"""
CALL_CPP = """
int main(int, char** values) {
    std::vector<std::uint8_t> rgb(64 * 64 * 3);
    return edit(values[1], {rgb.data(), 64, 64}).size() == rgb.size() ? 0 : 1;
}
"""


def example(header: str, prefix: str) -> str:
    """The indented code in the comment that opens a header."""
    text = (INCLUDE / "hywu" / header).read_text()
    head = text[: text.index("#ifndef")]
    lines = [
        line.removeprefix(prefix)
        for line in head.splitlines()
        if line.startswith((prefix + "    ", prefix.rstrip()))
    ]
    code = [
        line[4:] if line.startswith("    ") else ""
        for line in lines
        if line.startswith("    ") or not line.strip()
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(code)).strip() + "\n"


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


def compile_and_link(source: Path, library: Library, *flags: str) -> Path:
    program = source.with_suffix("")
    command = [
        compiler("gcc" if source.suffix == ".c" else "g++"), *WARNINGS, *flags, f"-I{INCLUDE}", str(source),
        "-o", str(program), str(library.path), f"-Wl,-rpath,{library.path.parent}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return program


def run(program: Path, *arguments: object) -> str:
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_example_of_the_c_header(library: Library, demo_bundle: Path, tmp_path: Path) -> None:
    code = example("hywu.h", " * ")
    assert code.startswith("#include <hywu/hywu.h>")
    (tmp_path / "usage.c").write_text(code + CALL_C)
    program = compile_and_link(tmp_path / "usage.c", library, "-std=c99")
    assert run(program, demo_bundle).startswith("64 x 64 pixels at ")


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_the_example_of_the_cpp_header(
    library: Library, demo_bundle: Path, tmp_path: Path, standard: str
) -> None:
    code = example("hywu.hpp", "// ")
    assert code.startswith("#include <hywu/hywu.hpp>")
    (tmp_path / "usage.cpp").write_text("#include <cstdint>\n#include <vector>\n" + code + CALL_CPP)
    run(compile_and_link(tmp_path / "usage.cpp", library, f"-std={standard}"), demo_bundle)


def test_the_cpp_header_without_exceptions(library: Library, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.cpp").write_text(
        """
        #include <cstdio>
        #include <hywu/hywu.hpp>
        int main(int, char** values) {
            hywu::Result<hywu::Editor> nothing = hywu::Editor::load("/nowhere");
            if (nothing || nothing.error().status() != hywu::Status::bundle) return 1;
            hywu::Result<hywu::Editor> editor = hywu::Editor::load(values[1]);
            if (!editor) return std::puts(editor.error().what()), 2;
            std::vector<std::uint8_t> rgb(16 * 8 * 3), out(rgb.size());
            const std::vector<float> region(8, 0.5F);
            hywu::EditOptions options;
            options.inputs = {{"region", {1, 1, 2, 4}, region.data()}};
            hywu::Result<hywu::Images> images = editor->edit({rgb.data(), 16, 8}, "abc", options);
            if (!images) return std::puts(images.error().what()), 3;
            const hywu::Sample sample = {{rgb.data(), 16, 8}, "abc"};
            const auto size = editor->edit_into({&sample, 1}, out, options);
            if (!size || size->first != 16) return 4;
            const auto bytes = (*images)[0].bytes();
            if (!std::equal(bytes.begin(), bytes.end(), out.begin(), out.end())) return 5;
            options.seeds = {1, 2};
            if (editor->edit({&sample, 1}, options).error().status() != hywu::Status::input) return 6;
            const auto timings = editor->timings();
            hywu::Editor moved = std::move(*editor);
            if (editor->warm_up()) return 7;  // nothing is left there
            const auto deltas = moved.generate({rgb.data(), 16, 8}, "abc", options);
            if (!deltas || deltas->size() != 2 || deltas->tensor(1)->name != "mix.lora_B") return 8;
            return timings && timings->steps.size() == 3 ? 0 : 9;
        }
        """
    )
    run(compile_and_link(tmp_path / "plain.cpp", library, "-std=c++17", "-fno-exceptions", "-fno-rtti"), toy)


def test_the_cpp_header_passes_exceptions_of_callbacks_on(
    library: Library, toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "throws.cpp").write_text(
        """
        #include <hywu/hywu.hpp>
        struct Mine {};
        int main(int, char** values) {
            hywu::Editor editor = hywu::Editor::load(values[1]);
            std::vector<std::uint8_t> rgb(16 * 8 * 3);
            const std::vector<float> region(8, 0.5F);
            hywu::EditOptions options;
            options.inputs = {{"region", {1, 1, 2, 4}, region.data()}};
            options.progress = [](std::int32_t, std::int32_t) { throw Mine(); };
            try {
                editor.edit({rgb.data(), 16, 8}, "abc", options);
                return 1;
            } catch (const Mine&) {
            }
            options.progress = nullptr;
            options.steps = 77;
            try {
                editor.edit({rgb.data(), 16, 8}, "abc", options);
                return 2;
            } catch (const hywu::Error& error) {
                return error.wrong().find("77 steps") == 0 && error.status() == hywu::Status::input ? 0 : 3;
            }
        }
        """
    )
    run(compile_and_link(tmp_path / "throws.cpp", library, "-std=c++17"), toy)


def test_the_examples(library: Library, demo_bundle: Path, tmp_path: Path) -> None:
    """In C, in C++ and through ctypes: the pictures of the Python runtime."""
    photo = np.asarray(Image.open(RUNTIME.parent / "demo/photos/coffee.jpg").convert("RGB").resize((64, 64)))
    Image.fromarray(photo).save(tmp_path / "photo.ppm")
    with Editor.load(demo_bundle) as editor:
        expected = editor.edit(photo, "make it sepia", seed=42, output="array")
        half = editor.edit(photo, "make it sepia", seed=42, delta_strength=0.5, output="array")

    def compare(path: Path, picture: object) -> None:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)

    shutil.copy(RUNTIME / "examples" / "edit.c", tmp_path / "edit_c.c")
    program = compile_and_link(tmp_path / "edit_c.c", library, "-std=c99")
    run(program, demo_bundle, tmp_path / "photo.ppm", "make it sepia", tmp_path / "c.ppm")
    compare(tmp_path / "c.ppm", expected)

    shutil.copy(RUNTIME / "examples" / "find_package" / "edit.cpp", tmp_path / "edit_cpp.cpp")
    program = compile_and_link(tmp_path / "edit_cpp.cpp", library, "-std=c++17")
    run(program, demo_bundle, tmp_path / "photo.ppm", "make it sepia", tmp_path / "cpp")
    compare(tmp_path / "cpp-full.ppm", expected)
    compare(tmp_path / "cpp-half.ppm", half)

    script = RUNTIME / "examples" / "edit_ctypes.py"
    arguments = [demo_bundle, tmp_path / "photo.ppm", "make it sepia", tmp_path / "ctypes.png", library.path]
    subprocess.run([os.sys.executable, script, *map(str, arguments)], check=True)  # type: ignore[attr-defined]
    compare(tmp_path / "ctypes.png", expected)
