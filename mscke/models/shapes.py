"""The paper's models at their published shapes with random weights: nothing is downloaded, nothing they say means anything.

What they take (memory, seconds, a fault in a device or a type) is what the real ones take. ``tiny`` ones are the same
architectures, small enough for a test.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers as hf

from mscke.models.prompts import IN_CONTEXT, TEMPLATE
from mscke.models.tiny import LAYERS, WIDTH, llama_tokenizer, opt_tokenizer

OPT_2_7B = {  # Zhang et al., arXiv:2205.01068, Tab. 1; the vocabulary as its release has it
    "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 50272,
}  # fmt: skip
OPT_125M = OPT_2_7B | {
    "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip
LLAMA_7B = {  # Touvron et al., arXiv:2302.13971, Tab. 2
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32001,
}  # fmt: skip
_SMALL = {"hidden_size": WIDTH, **LAYERS}
TEXTS = {
    "opt-2.7b": hf.OPTConfig(**OPT_2_7B),
    "opt-125m": hf.OPTConfig(**OPT_125M),
    "vicuna-7b": hf.LlamaConfig(**LLAMA_7B, bos_token_id=1, eos_token_id=2),
    "opt-tiny": hf.OPTConfig(
        **_SMALL, word_embed_proj_dim=WIDTH, ffn_dim=48, vocab_size=768, max_position_embeddings=2048
    ),
    "vicuna-tiny": hf.LlamaConfig(**_SMALL, intermediate_size=48, vocab_size=640, bos_token_id=1, eos_token_id=2),
}  # by name; BLIP-2's vision tower (ViT-g) and Q-Former are transformers' defaults


def blip2_config(text: str, side: int = 224) -> hf.Blip2Config:
    """BLIP-2 around the text model ``text``, one of :data:`TEXTS`; a tiny one has tiny eyes."""
    small = {"hidden_size": WIDTH, "intermediate_size": 48, **LAYERS} if text.endswith("tiny") else {}
    vision = hf.Blip2VisionConfig(image_size=side, **small)
    former = hf.Blip2QFormerConfig(**small, **({"encoder_hidden_size": WIDTH} if small else {}))
    words = TEXTS[text].to_dict()
    words["vocab_size"] = -(-(words["vocab_size"] + 1) // 64) * 64  # with a placeholder for images, as on the hub
    return hf.Blip2Config(vision_config=vision, qformer_config=former, text_config=words)


def mllm(
    text: str, texts: Sequence[str], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[hf.Blip2ForConditionalGeneration, hf.PreTrainedTokenizerBase]:
    """BLIP-2 around ``text`` on ``device``, and a tokenizer of its family that has learned from ``texts`` alone."""
    torch.manual_seed(seed)
    with device:
        model = hf.Blip2ForConditionalGeneration._from_config(blip2_config(text), dtype=dtype)
    make = opt_tokenizer if text.startswith("opt") else llama_tokenizer
    tokenizer = make([*texts, TEMPLATE, IN_CONTEXT, "###Human: <Img></Img> "])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def text_model(text: str, seed: int = 0) -> hf.PreTrainedModel:
    """The text model ``text`` alone, float32 on the CPU: a counterfactual model's beginning."""
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(TEXTS[text], dtype=torch.float32)
