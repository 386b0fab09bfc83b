"""Families: the knowledge of one diffusers pipeline class each, in one file each.

To add one, write its file and register its class here, in one line.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hywu_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from hywu_export.families.base import Family

REGISTRY = {  # pipeline class in model_index.json, or architecture in config.json → module:class
    "HunyuanImage3ForCausalMM": "hunyuan_image3:HunyuanImage3Instruct",
    "SanaSprintImg2ImgPipeline": "sana_sprint:SanaSprint",
    "StableDiffusion3Img2ImgPipeline": "sd3_img2img:StableDiffusion3Img2Img",
    "FluxKontextPipeline": "flux_kontext:FluxKontext",
    "QwenImageEditPipeline": "qwen_image_edit:QwenImageEdit",
    "QwenImageEditPlusPipeline": "qwen_image_edit:QwenImageEditPlus",
    "StableDiffusionInstructPix2PixPipeline": "instruct_pix2pix:InstructPix2Pix",
    "StableDiffusionXLInstructPix2PixPipeline": "sdxl_instruct_pix2pix:SdxlInstructPix2Pix",
}


def open_base(folder: Path) -> Family:
    """The family that knows the pipeline in ``folder``, opened on it.

    Raises:
        CheckpointError: the folder is no sound diffusers pipeline.
        UnsupportedError: no family knows its class, or the family does not know one of its settings.
    """
    from hywu_export.families.components import pipeline_class

    name = pipeline_class(folder)
    if name not in REGISTRY:
        raise UnsupportedError(
            f"{folder} is a {name}", f"One of {', '.join(REGISTRY)} was expected", "Export one of these"
        )
    module, _, class_name = REGISTRY[name].partition(":")
    family: type[Family] = getattr(import_module(f"{__name__}.{module}"), class_name)
    return family(folder)
