"""diffusers' own Qwen-Image editing pipelines, for comparison: what ``hywu verify`` and the tests run.

Two things differ from ``from_pretrained`` and a call. The processor is made of transformers' tokenizer and
its Pillow image processor, as its own class asks for torchvision, for videos; Pillow also is what the
runtimes' pixels are those of. And the text encoder is told which tokens are pictures: from transformers 5 on
it must be, or it silently takes them for text and gives them other positions than those it was trained with,
and the pipelines of diffusers up to 0.42 do not (diffusers issue 14194).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BatchFeature, ProcessorMixin

Photo = npt.NDArray[np.uint8]
AREA = 1024 * 1024  # to which the pipelines bring pictures


class Processor(ProcessorMixin):  # type: ignore[misc]  # transformers is untyped here
    """Texts with pictures to tensors, as ``Qwen2VLProcessor`` does it."""

    attributes = ()

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(
            folder / "processor", local_files_only=True
        )

    def __call__(self, images: Any = None, text: Sequence[str] = (), **_: Any) -> BatchFeature:
        made = self.image_processor(images, return_tensors="pt")
        counts = iter((made["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        mark = "<|image_pad|>"
        filled = []
        for one in text:
            start, *rest = one.split(mark)
            filled.append(start + "".join(mark * next(counts) + part for part in rest))
        tokens = self.tokenizer(filled, padding=True, padding_side="right", return_tensors="pt")
        return BatchFeature({**tokens, **made})


def open_pipeline(folder: Path, pipeline_class: str) -> Any:
    """The pipeline in ``folder``, in float32."""
    import diffusers

    pipeline = getattr(diffusers, pipeline_class).from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, processor=Processor(folder)
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline.text_encoder.config.image_token_id

    def tell(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kinds = {"mm_token_type_ids": (kwargs["input_ids"] == picture).to(torch.int32)}
        return args, kinds | kwargs

    pipeline.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    return pipeline


def edit_with(
    pipeline: Any,
    photos: Sequence[Sequence[Photo]],
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    steps: int,
    scale: float,
    latents: npt.NDArray[np.float32],
) -> list[Photo]:
    """What a pipeline makes of ``photos``, several for each sample in the Plus pipeline.

    Photos are worked on at their own size, and the result has that of the last photo of the first sample; the
    pipeline would bring them to an area of 1024². ``latents``: ``[B, C, h, w]``.
    """
    from PIL import Image

    pictures = [[Image.fromarray(photo) for photo in sample] for sample in photos]
    # The pipelines ask for the size of the result, then for that of each picture.
    sizes = [picture.size for picture in (pictures[0][-1], *pictures[0])]
    several = len(prompts) > 1
    with _working_sizes(pipeline, sizes), torch.no_grad():
        made = pipeline(
            image=[picture for (picture,) in pictures] if several else pictures[0],
            prompt=list(prompts) if several else prompts[0],
            negative_prompt=list(negative_prompts) if several else negative_prompts[0],
            true_cfg_scale=scale,
            num_inference_steps=steps,
            latents=pipeline._pack_latents(torch.from_numpy(latents), *latents.shape),
        ).images
    return [np.asarray(picture) for picture in made]


@contextmanager
def _working_sizes(pipeline: Any, sizes: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Within it, ``sizes`` are what the pipeline gets where it asks for the size of a working picture."""
    module: Any = sys.modules[type(pipeline).__module__]
    own, given = module.calculate_dimensions, iter(sizes)

    def chosen(area: float, ratio: float) -> tuple[Any, ...]:
        made: tuple[Any, ...] = own(area, ratio)
        return (*next(given), *made[2:]) if area == AREA else made

    module.calculate_dimensions = chosen
    try:
        yield
    finally:
        module.calculate_dimensions = own
