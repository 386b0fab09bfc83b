"""The report of a variant: its JSON against its schema, and its page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import jsonschema
import numpy as np

from hywu_calibration.html import Pictures, render
from hywu_calibration.report import (
    SCHEMA,
    Edit,
    FinalImage,
    LayerReport,
    Quality,
    Report,
    Samples,
    Size,
    Skipped,
    Target,
    Wide,
    versions,
)

EDITS = [Edit("cat <1>.jpg", 'make it "sepia" & <b>', (32, 24), True, 30.0 + i, i + 1) for i in range(8)]
REPORT = Report(
    "mine", "int8", FinalImage(Quality.of(EDITS), Quality.of(EDITS[4:]), "runtime"),
    (
        LayerReport("step", "unet.a", "MatMul", 31.25, "int8"),
        LayerReport("step", "unet.b", "Conv", math.inf, "fp16"),
        LayerReport("step", "unet.c", "Gemm", None, "int8"),
    ),
    (Wide("step", "unet.b", "Conv", "SQNR 9.0 dB"),),
    Size(4 << 20, 1 << 20, {"unet": (4 << 20, 1 << 20)}),
    Samples(8, 2, 4, 2, (Skipped("broken.jpg", "truncated"),)), 7, versions(), "mse", 0.8, Target(32, 0.1),
)  # fmt: skip


def pictures() -> list[Pictures]:
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (24, 32, 3), np.uint8)
    return [
        Pictures(edit, a, np.clip(a + np.int16(i), 0, 255).astype(np.uint8)) for i, edit in enumerate(EDITS)
    ]


def test_json_is_what_the_schema_says() -> None:
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    content = json.loads(REPORT.dumps())
    validator.validate(content)
    assert content["final_image"]["deltas_on"]["psnr_db"] == 33.5
    assert [layer["sqnr_db"] for layer in content["layers"]] == [31.25, 200.0, None]
    assert set(content) == set(schema["properties"]) == set(schema["required"])
    without = replace(REPORT, final_image=replace(REPORT.final_image, deltas_on=None), target=None)
    validator.validate(without.to_json())
    for key in content:  # the schema would notice what is missing
        assert not validator.is_valid({k: v for k, v in content.items() if k != key})


def test_target_and_wide_layers() -> None:
    assert REPORT.met is False  # the worst edit has 30 dB, 32 were asked for
    assert replace(REPORT, target=Target(29, 0.1)).met is True
    assert replace(REPORT, target=None).met is None
    assert REPORT.wide_layers == 1


def test_page_is_whole_by_itself() -> None:
    page = render(REPORT, pictures())
    assert page == render(REPORT, pictures())
    opened: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            for name, value in attributes:
                assert name not in ("srcset", "onload")
                assert name not in ("src", "href") or (value or "").startswith("data:image/png;base64,")
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            while opened[-1] != tag and opened[-1] in ("meta", "img", "br"):
                opened.pop()
            assert opened.pop() == tag

    Tags().feed(page)
    assert not opened
    assert not re.search(r"url\(|https?:", page)
    assert "cat &lt;1&gt;.jpg" in page
    assert "<b>\u201d" not in page  # the instruction's own markup stays text
    assert page.count("<img") == 3 * 6


def test_page_without_pictures_layers_and_deltas() -> None:
    bare = replace(
        REPORT, layers=(), wide=(), target=None, size=Size(0, 0),
        final_image=FinalImage(None, Quality.of(EDITS[:1]), "emulation"),
    )  # fmt: skip
    assert "emulated" in render(bare)
