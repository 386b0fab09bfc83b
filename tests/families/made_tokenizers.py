"""Small tokenizers of the kinds that large pipelines have, over `WORDS`."""

from __future__ import annotations

from typing import Any

from tiny_pairs import WORDS


def t5() -> Any:
    """A ``T5TokenizerFast``: Unigram over words and single characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for text in WORDS for word in text.split()]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    unigram = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=unigram, extra_ids=0)


def gemma() -> Any:
    """A ``GemmaTokenizerFast``: BPE over the whole text, spaces as ``▁``, bytes for what is unknown.

    The words of SANA's instruction are in it, so that this is not a thousand tokens long.
    """
    from inspect import signature

    from diffusers import SanaSprintImg2ImgPipeline
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import GemmaTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary += [chr(code) for code in range(33, 127)]
    merges: list[tuple[str, str]] = []
    parameters = signature(SanaSprintImg2ImgPipeline.__call__).parameters
    instruction = parameters["complex_human_instruction"].default
    for word in dict.fromkeys(word for text in (*WORDS, *instruction) for word in text.split()):
        grown = "▁"
        for letter in word:
            if grown + letter not in vocabulary:
                vocabulary.append(grown + letter)
                merges.append((grown, letter))
            grown += letter
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    return GemmaTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
