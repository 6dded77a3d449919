"""MiniGPT-4 composed of tiny parts in each source's format; the hub's form of BLIP-2; memory needed."""

import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    T5Config,
)

from mscke.benchmark.sample import Query
from mscke.models.compose import compose_minigpt4, memory_needed, seeing_shards
from mscke.models.mllm import IMAGE_TOKEN, MLLM, TEMPLATE, embed, load_pixels

pytest_plugins = ["tiny"]
WIDTH = 32
TEXTS = ["###Human: <Img></Img> Question: What is it? Short answer: a kite", "red green blue owl on the card"]


def llama_tokenizer() -> LlamaTokenizer:
    """A tokenizer of Llama's class: SentencePiece's ▁ for spaces, <s> and </s>, no padding token."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    learner.train_from_iterator(TEXTS, trainer)
    learned = json.loads(learner.to_str())["model"]
    return LlamaTokenizer(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The three parts, live and saved as published: a dict of modules and the folder they are in."""
    folder, tokenizer = tmp_path_factory.mktemp("parts"), llama_tokenizer()
    torch.manual_seed(3)
    vision = Blip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=42, initializer_range=0.3,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    blip2 = Blip2ForConditionalGeneration(
        Blip2Config(vision_config=vision, qformer_config=qformer, text_config=t5, num_query_tokens=4)
    ).eval()
    torch.nn.init.normal_(blip2.query_tokens)
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vicuna, projection = LlamaForCausalLM(llama).eval(), torch.nn.Linear(24, WIDTH)
    blip2.save_pretrained(folder / "blip2", max_shard_size="30KB")
    vicuna.save_pretrained(folder / "vicuna", max_shard_size="30KB")
    tokenizer.save_pretrained(folder / "vicuna")
    weights = {f"llama_proj.{name}": tensor for name, tensor in projection.state_dict().items()}
    torch.save({"model": weights, "epoch": 4}, folder / "minigpt4.pth")
    return {"folder": folder, "blip2": blip2, "vicuna": vicuna, "projection": projection}


def compose(folder, target, **other):
    sources = {"blip2": folder / "blip2", "minigpt4": folder / "minigpt4.pth", "vicuna": folder / "vicuna"}
    return compose_minigpt4(**sources | other, target=target, shard="40KB")


@pytest.fixture(scope="module")
def composed(parts, tmp_path_factory):
    return compose(parts["folder"], tmp_path_factory.mktemp("composed") / "minigpt4")


@torch.inference_mode()
def through_the_parts(parts, image: str, question: str) -> torch.Tensor:
    """Logits (1, L, vocabulary) by hand, each piece of the prompt tokenised by itself as MiniGPT-4 does."""
    tokenizer = LlamaTokenizer.from_pretrained(parts["folder"] / "vicuna")
    states = parts["blip2"].vision_model(pixel_values=load_pixels([image], 42)).last_hidden_state
    seen = parts["blip2"].qformer(parts["blip2"].query_tokens, encoder_hidden_states=states)[0]
    weights = torch.load(parts["folder"] / "minigpt4.pth", weights_only=True)["model"]
    visual = F.linear(seen, weights["llama_proj.weight"], weights["llama_proj.bias"])

    def words(text):
        return parts["vicuna"].model.embed_tokens(
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        )

    start = parts["vicuna"].model.embed_tokens(torch.tensor([[tokenizer.bos_token_id]]))
    pieces = [start, words("###Human: <Img>"), visual, words("</Img> "), words(TEMPLATE.format(question))]
    return parts["vicuna"](inputs_embeds=torch.cat(pieces, 1)).logits


def test_logits_are_those_of_the_parts(parts, composed, records):
    mllm = MLLM.from_pretrained(composed, "MiniGPT-4")
    queries = [Query(f"What is {i}?", records[i].edit.image) for i in (0, 1)]
    for query in queries:
        ids = torch.tensor(mllm.prompts([query]))
        embedded = embed(mllm.model.language_model, ids, mllm.encoder.image_id, mllm.see([query]))
        with torch.inference_mode():
            logits = mllm.model.language_model(inputs_embeds=embedded).logits
        expected = through_the_parts(parts, query.image, query.question)
        assert ids.shape[1] == expected.shape[1]
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)
