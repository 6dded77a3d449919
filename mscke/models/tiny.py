"""Tiny models and data in the very formats of the published ones: ``make paper PRESET=tiny`` runs on them.

``python -m mscke.models.tiny`` writes two folders as a user's own DATA= and MODELS= would be. The weights are
random and the records are FGVEdit-Scenes' without what FGVEdit does not tell: what comes out means nothing,
but what the real ones go through on a CPU has been gone through.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from mscke.benchmark.generate import generate
from mscke.benchmark.pictures import open_image
from mscke.benchmark.sample import FIELDS
from mscke.config import Track, get_track
from mscke.fetching.store import FILES, MINIGPT4_NAMES
from mscke.models.prompts import IMAGE_TOKEN, IN_CONTEXT, TEMPLATE

WIDTH, QFORMER_WIDTH, QUERIES, IMAGE = 32, 24, 4, 42
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
FOLDERS = {"train": "train2014", "test": "val2014"}


def llama_tokenizer(texts: list[str]) -> hf.LlamaTokenizer:
    """A tokenizer of Llama's class: SentencePiece's ▁ for spaces, <s> and </s>, no padding token."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    return hf.LlamaTokenizer(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]])


def opt_tokenizer(texts: list[str]) -> hf.GPT2Tokenizer:
    """A tokenizer of OPT's class: byte-level, </s> at both ends, padding of its own."""
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, 700, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    learned = json.loads(learner.to_str())["model"]
    return hf.GPT2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], bos_token="</s>",
        eos_token="</s>", pad_token="<pad>", unk_token="</s>", add_bos_token=True,
    )  # fmt: skip


def blip2(text: hf.OPTConfig | hf.T5Config, seed: int, **options) -> hf.Blip2ForConditionalGeneration:
    """BLIP-2 with random weights and this text model."""
    torch.manual_seed(seed)
    sizes = {"initializer_range": 0.3, **LAYERS}
    vision = hf.Blip2VisionConfig(hidden_size=WIDTH, intermediate_size=64, image_size=IMAGE, **sizes)
    qformer = hf.Blip2QFormerConfig(hidden_size=QFORMER_WIDTH, intermediate_size=48, **sizes)
    config = hf.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=QUERIES, **options
    )
    model = hf.Blip2ForConditionalGeneration(config).eval()
    nn.init.normal_(model.query_tokens)
    return model


def opt(tokenizer: hf.PreTrainedTokenizerBase, width: int) -> hf.OPTConfig:
    """OPT's configuration; its vocabulary is padded, as the hub's is."""
    return hf.OPTConfig(
        vocab_size=-(-(len(tokenizer) + 1) // 64) * 64, hidden_size=width, word_embed_proj_dim=width,
        ffn_dim=48, max_position_embeddings=512, init_std=0.3, bos_token_id=2, eos_token_id=2,
        pad_token_id=1, **LAYERS,
    )  # fmt: skip


def write_blip2_opt(folder: Path, texts: list[str]) -> hf.Blip2ForConditionalGeneration:
    """``Salesforce/blip2-opt-2.7b``: shards with an index, OPT's tokenizer with the image token, a processor."""
    tokenizer, size = opt_tokenizer(texts), {"height": IMAGE, "width": IMAGE}
    images = hf.BlipImageProcessor(size=size)
    processor = hf.Blip2Processor(images, tokenizer, QUERIES)  # adds the image token
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = blip2(opt(tokenizer, WIDTH), seed=4, image_token_index=image_id)
    model.save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    return model


def write_blip2_t5(folder: Path) -> hf.Blip2ForConditionalGeneration:
    """``Salesforce/blip2-flan-t5-xxl``: shards with an index, some of which hold text alone."""
    text = hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = blip2(text, seed=3)
    model.save_pretrained(folder, max_shard_size="30KB")
    return model


def write_vicuna(folder: Path, texts: list[str]) -> hf.LlamaForCausalLM:
    """Vicuna: Llama in shards, its tokenizer without an image token."""
    tokenizer = llama_tokenizer(texts)
    torch.manual_seed(5)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, **LAYERS,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    return model


def write_minigpt4(path: Path) -> nn.Linear:
    """MiniGPT-4's checkpoint: a pickle of tensors, of which the projection is wanted."""
    torch.manual_seed(6)
    projection = nn.Linear(QFORMER_WIDTH, WIDTH)
    weights = {f"llama_proj.{name}": tensor for name, tensor in projection.state_dict().items()}
    torch.save({"model": weights, "epoch": 4}, path)
    return projection


def write_opt(folder: Path, texts: list[str]) -> None:
    """``facebook/opt-125m``: a pickle of tensors, and the tokenizer of the larger OPTs."""
    tokenizer = opt_tokenizer(texts)
    torch.manual_seed(7)
    model = hf.OPTForCausalLM(opt(tokenizer, 24))
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_clip(folder: Path, patch: int) -> None:
    """A CLIP of OpenAI's as open_clip has it on the hub."""
    vision = {"image_size": 224, "layers": 1, "width": WIDTH, "head_width": 16, "patch_size": patch}
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1}
    model = {"embed_dim": WIDTH, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model, "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "shortest"}}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(patch)
    weights = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def write_data(folder: Path, sizes: dict[str, int]) -> list[str]:
    """FGVEdit's JSON files, COCO's train2014 as a folder and val2014 as its zip; the texts of all records.

    The images are no squares, and each split begins with a record that has no answer: FGVEdit may have such.
    """
    texts = []
    with TemporaryDirectory() as scratch:
        for split, size in sizes.items():
            rows, coco = (json.loads(generate(Path(scratch), split, size).read_text(encoding="utf-8")), FOLDERS[split])
            for number, row in enumerate(rows):
                with Image.new("RGB", (128, 96), "grey") as wide:
                    wide.paste(open_image(Path(scratch) / row["image"]), (16, 0))
                    row["image"] = f"{coco}/COCO_{coco}_{number:012d}.jpg"
                    (folder / coco).mkdir(parents=True, exist_ok=True)
                    wide.save(folder / row["image"], quality=90)
            rows = [{name: row[name] for name in FIELDS} for row in rows]
            texts += [text for row in rows for text in row.values()]
            (folder / FILES[split]).write_text(json.dumps([rows[0] | {"alt": ""}, *rows]), encoding="utf-8")
    with zipfile.ZipFile(folder / "val2014.zip", "w") as archive:
        for path in sorted((folder / "val2014").iterdir()):
            archive.write(path, f"val2014/{path.name}")
            path.unlink()
    (folder / "val2014").rmdir()
    return texts


def write(track: Track) -> Path:
    """Everything that ``track`` names, in ``data`` and ``models`` below the folder returned; made once, or whole."""
    target = track.sources["data"].parent
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".sources-", dir=target.parent) as scratch:
        data, hub = Path(scratch) / target.name / "data", Path(scratch) / target.name / "models"
        texts = write_data(data, track.sizes)
        texts += [TEMPLATE, IN_CONTEXT, "###Human: <Img></Img> "]
        write_blip2_opt(hub / "Salesforce/blip2-opt-2.7b", texts)
        write_blip2_t5(hub / "Salesforce/blip2-flan-t5-xxl")
        write_vicuna(hub / "Vision-CAIR/vicuna-7b", texts)
        write_opt(hub / "facebook/opt-125m", texts)
        write_clip(hub / "timm/vit_base_patch32_clip_224.openai", 32)
        write_clip(hub / "timm/vit_large_patch14_clip_224.openai", 14)
        write_minigpt4(hub / MINIGPT4_NAMES[0])
        data.parent.rename(target)
    return target


if __name__ == "__main__":
    print(write(get_track(sys.argv[1] if len(sys.argv) > 1 else "paper-tiny")))
