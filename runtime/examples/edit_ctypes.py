"""Edits a photo with the C library from Python, without the package: ctypes, NumPy and Pillow.

python edit_ctypes.py BUNDLE photo.jpg "make it sepia" edited.png [libhywu.so]

The structs mirror hywu.h; `*_params_init` fills them with defaults, so a program sets what it needs.
"""

import ctypes
import sys

import numpy as np
from PIL import Image


class Pixels(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("stride", ctypes.c_size_t),
    ]


class EditParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("count", ctypes.c_size_t), ("photos", ctypes.POINTER(Pixels)),
        ("prompts", ctypes.POINTER(ctypes.c_char_p)), ("prompt_lengths", ctypes.c_void_p),
        ("negative_prompts", ctypes.c_void_p), ("negative_prompt_lengths", ctypes.c_void_p),
        ("seed", ctypes.c_uint64), ("seeds", ctypes.c_void_p),
        ("guidance", ctypes.c_void_p), ("guidance_count", ctypes.c_size_t),
        ("delta_strength", ctypes.c_double), ("delta_strengths", ctypes.c_void_p),
        ("deltas", ctypes.c_void_p), ("delta_count", ctypes.c_size_t),
        ("sampler", ctypes.c_char_p), ("steps", ctypes.c_int32),
        ("width", ctypes.c_int32), ("height", ctypes.c_int32), ("reserved", ctypes.c_int32),
        ("noise", ctypes.c_void_p), ("latents", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p), ("input_count", ctypes.c_size_t),
        ("progress", ctypes.c_void_p), ("progress_user", ctypes.c_void_p), ("cancel", ctypes.c_void_p),
        ("strength", ctypes.c_double), ("photo_count", ctypes.c_size_t),
    ]  # fmt: skip


def main(bundle: str, photo: str, prompt: str, out: str, library: str = "libhywu.so.0") -> None:
    hywu = ctypes.CDLL(library)
    hywu.hywu_last_error.restype = ctypes.c_char_p

    def check(status: int) -> None:
        if status != 0:
            sys.exit(hywu.hywu_last_error().decode())

    rgb = np.ascontiguousarray(Image.open(photo).convert("RGB"))
    params = EditParams()
    check(hywu.hywu_edit_params_init(ctypes.byref(params), ctypes.c_size_t(ctypes.sizeof(params))))
    params.photos = ctypes.pointer(Pixels(rgb.ctypes.data, rgb.shape[1], rgb.shape[0], 0))
    params.prompts = (ctypes.c_char_p * 1)(prompt.encode())
    params.seed = 42

    editor, images, edited = ctypes.c_void_p(), ctypes.c_void_p(), Pixels()
    check(hywu.hywu_editor_load(bundle.encode(), None, None, ctypes.byref(editor)))
    check(hywu.hywu_edit(editor, ctypes.byref(params), ctypes.byref(images)))
    check(hywu.hywu_images_get(images, ctypes.c_size_t(0), ctypes.byref(edited)))
    pixels = ctypes.string_at(edited.data, edited.stride * edited.height)
    Image.frombytes("RGB", (edited.width, edited.height), pixels).save(out)
    hywu.hywu_images_free(images)
    hywu.hywu_editor_free(editor)


if __name__ == "__main__":
    if not 5 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
