"""MiniGPT-4 composed of tiny parts in each source's format; the hub's form of BLIP-2; memory needed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor, LlamaTokenizer

from mscke.benchmark.sample import Query
from mscke.fetching.hub import SEEING, read_index
from mscke.fetching.lock import FetchError
from mscke.models.compose import compose_minigpt4, memory_needed, open_weights
from mscke.models.mllm import MLLM, load_pixels
from mscke.models.prompts import IMAGE_TOKEN, TEMPLATE, embed
from mscke.models.tiny import write_blip2_opt, write_blip2_t5, write_minigpt4, write_vicuna

pytest_plugins = ["tiny"]
TEXTS = ["###Human: <Img></Img> Question: What is it? Short answer: a kite", "red green blue owl on the card"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The three parts, live and saved as published: a dict of modules and the folder they are in."""
    folder = tmp_path_factory.mktemp("parts")
    live = {"blip2": write_blip2_t5(folder / "blip2"), "vicuna": write_vicuna(folder / "vicuna", TEXTS)}
    return live | {"folder": folder, "projection": write_minigpt4(folder / "minigpt4.pth")}


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

    def words(text):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return parts["vicuna"].model.embed_tokens(ids)

    visual, question = parts["projection"](seen), words(TEMPLATE.format(question))
    pieces = [words("<s>"), words("###Human: <Img>"), visual, words("</Img> "), question]
    return parts["vicuna"](inputs_embeds=torch.cat(pieces, 1)).logits


def test_logits_are_those_of_the_parts(parts, composed, records):
    mllm = MLLM.from_pretrained(composed, "MiniGPT-4")
    for query in (Query(f"What is {i}?", records[i].edit.image) for i in (0, 1)):
        ids = torch.tensor(mllm.prompts([query]))
        embedded = embed(mllm.model.language_model, ids, mllm.encoder.image_id, mllm.see([query]))
        with torch.inference_mode():
            logits = mllm.model.language_model(inputs_embeds=embedded).logits
        expected = through_the_parts(parts, query.image, query.question)
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)
        assert (logits[..., expected.shape[-1] :] < expected.amax(-1, keepdim=True)).all()  # no new word wins


def test_answers_are_tokenised_as_they_stand_in_a_sentence(composed):
    encoder = MLLM.from_pretrained(composed, "MiniGPT-4").encoder
    cue, answer = encoder.tokens("Short answer:"), encoder.answer("a kite", eos=False)
    assert cue + answer == encoder.tokens("Short answer: a kite")


def test_nothing_is_rounded_and_new_words_are_average(parts, composed):
    state = gather_all(composed)
    theirs = {n: t for n, t in parts["blip2"].state_dict().items() if "language" not in n}
    theirs |= {f"language_model.{n}": t for n, t in parts["vicuna"].state_dict().items()}
    theirs |= {f"language_projection.{n}": t for n, t in parts["projection"].state_dict().items()}
    assert set(state) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(state[name][: len(tensor)], tensor), name
        if len(state[name]) > len(tensor):
            assert name.endswith(("embed_tokens.weight", "lm_head.weight"))
            torch.testing.assert_close(state[name][len(tensor) :].mean(0), tensor.mean(0), atol=1e-6, rtol=1e-4)


def gather_all(folder) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in open_weights(path).items()}


def same(one, other) -> bool:
    """Whether the weights in two folders are."""
    one, other = gather_all(one), gather_all(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_image_token_is_one_token_everywhere(parts, composed):
    tokenizer, config = AutoTokenizer.from_pretrained(composed), AutoConfig.from_pretrained(composed)
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == config.image_token_index == len(tokenizer) - 1
    assert tokenizer(IMAGE_TOKEN, add_special_tokens=False)["input_ids"] == [config.image_token_index]
    assert config.image_token_index < config.text_config.vocab_size
    assert config.text_config.vocab_size % 64 == 0
    assert tokenizer.pad_token_id is not None


def test_only_the_seeing_shards_are_needed(parts, composed, tmp_path):
    few = shutil.copytree(parts["folder"] / "blip2", tmp_path / "few")
    where = read_index(few / "model.safetensors.index.json")
    blind = set(where.values()) - {file for name, file in where.items() if name.startswith(SEEING)}
    for file in blind:
        (few / file).unlink()
    assert blind and same(compose(parts["folder"], tmp_path / "again", blip2=few), composed)


@pytest.mark.parametrize("form", ["one pickle", "pickles with an index", "one safetensors"])
def test_vicuna_in_each_of_its_forms(parts, composed, tmp_path, form):
    """The hub has Vicuna in PyTorch's .bin files, some without an index."""
    vicuna, state = shutil.copytree(parts["folder"] / "vicuna", tmp_path / "vicuna"), parts["vicuna"].state_dict()
    for path in vicuna.glob("model*"):
        path.unlink()
    if form == "one pickle":
        torch.save(state, vicuna / "pytorch_model.bin")
    elif form == "one safetensors":
        save_file(state, vicuna / "model.safetensors")
    else:
        where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(sorted(state))}
        for file in set(where.values()):
            torch.save({name: state[name] for name in where if where[name] == file}, vicuna / file)
        (vicuna / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(compose(parts["folder"], tmp_path / "again", vicuna=vicuna), composed)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def repickle(**changes):
    """Write MiniGPT-4's checkpoint with other contents; None leaves a tensor out."""

    def spoil(path):
        weights = torch.load(path, weights_only=True)["model"] | {f"llama_proj.{k}": v for k, v in changes.items()}
        torch.save({"model": {k: v for k, v in weights.items() if v is not None}}, path)

    return spoil


class Harm:
    """What a pickle can do when it is trusted."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle's code was run",))


INDEX, PTH = "model.safetensors.index.json", "minigpt4.pth"
SPOILT = {  # the file, or the shard of a tensor; how; what is then said, if not of the file but of its folder: None
    "missing shard": ("blip2:query_tokens", Path.unlink, "is missing"),
    "truncated shard": ("vicuna:lm_head.weight", cut, "cut off or damaged"),
    "page in a shard's place": ("vicuna:lm_head.weight", lambda p: p.write_text("<html>"), "damaged"),
    "shard without its tensor": ("blip2:query_tokens", lambda p: save_file({"a": torch.ones(1)}, p), "no tensor '"),
    "truncated index": (f"blip2/{INDEX}", cut, "no index of weights, or cut off"),
    "no weights": (f"vicuna/{INDEX}", Path.unlink, None),
    "no config": ("vicuna/config.json", Path.unlink, None),
    "another model": ("vicuna/config.json", lambda p: p.write_text('{"model_type": "opt"}'), "type 'opt', not 'llama'"),
    "no tokenizer": ("vicuna/tokenizer.json", Path.unlink, None),
    "truncated tokenizer": ("vicuna/tokenizer.json", cut, None),
    "truncated projection": (PTH, cut, "cut off or damaged"),
    "projection missing": (PTH, repickle(bias=None), "no tensor 'llama_proj.bias'"),
    "projection of the 13B": (PTH, repickle(weight=torch.zeros(40, 24)), r"proj.weight' has shape \(40, 24\), not \(32, 24\)"),
    "pickle with code": (PTH, lambda p: torch.save({"model": Harm()}, p), "holds more than tensors"),
    "no checkpoint": (PTH, Path.unlink, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_bad_parts_are_named_and_leave_nothing_behind(parts, tmp_path, case):
    name, spoil, message = SPOILT[case]
    copy = shutil.copytree(parts["folder"], tmp_path / "parts")
    part, _, tensor = name.partition(":")
    path = copy / part / read_index(copy / part / INDEX)[tensor] if tensor else copy / part
    spoil(path)
    with pytest.raises((OSError, ValueError, FetchError), match=message) as raised:
        compose(copy, tmp_path / "out" / "minigpt4")
    assert str(path if message else path.parent) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_crash_while_writing_leaves_nothing_and_what_is_there_is_kept(parts, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    target = tmp_path / "out" / "minigpt4"
    with monkeypatch.context() as patch:
        patch.setattr("mscke.models.compose.save_torch_state_dict", full)
        with pytest.raises(OSError, match="No space"):
            compose(parts["folder"], target)
    assert not any(target.parent.iterdir())
    compose(parts["folder"], target)
    before = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    assert compose(parts["folder"], target) == target
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_needed_is_what_a_loaded_model_takes(composed, mllm_folders, dtype):
    for folder in (composed, *mllm_folders.values()):
        needed = memory_needed(AutoConfig.from_pretrained(folder), dtype)
        model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        tensors = [*model.parameters(), *model.buffers()]
        assert needed == sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture(scope="module")
def hub_blip2(tmp_path_factory):
    """BLIP-2 OPT as the hub has it: sharded safetensors, OPT's byte-level tokenizer, a processor."""
    folder = tmp_path_factory.mktemp("blip2-opt")
    write_blip2_opt(folder, TEXTS)
    return folder


@pytest.mark.parametrize("size", [42, 70])  # its own, and one at which positions are interpolated
def test_blip2_as_the_hub_has_it(hub_blip2, records, size):
    """MLLM's prompt, pixels and logits are those of transformers' own processor and forward pass."""
    mllm = MLLM.from_pretrained(hub_blip2, "BLIP-2", image_size=size)
    query = Query("What is on the red card?", records[0].edit.image)
    processor = Blip2Processor.from_pretrained(hub_blip2)
    inputs = processor(
        Image.open(query.image).convert("RGB"), TEMPLATE.format(query.question), return_tensors="pt",
        size={"height": size, "width": size},
    )  # fmt: skip
    assert mllm.prompts([query]) == inputs.input_ids.tolist()
    ours = load_pixels([query.image], size)
    torch.testing.assert_close(ours, inputs.pixel_values, atol=0.03, rtol=0)  # one grey level of resizing
    with torch.inference_mode():
        expected = mllm.model(**inputs | {"pixel_values": ours}, interpolate_pos_encoding=True).logits
        embedded = embed(mllm.model.language_model, inputs.input_ids, mllm.encoder.image_id, mllm.see([query]))
        logits = mllm.model.language_model(inputs_embeds=embedded).logits
    torch.testing.assert_close(logits, expected)


def test_another_size_is_another_image(hub_blip2, records, tmp_path):
    paths = [records[0].edit.image]
    own, larger = (MLLM.from_pretrained(hub_blip2, "BLIP-2", tmp_path, size) for size in (None, 70))
    assert not torch.allclose(own.features(paths), larger.features(paths))
    assert len(list(tmp_path.glob("qformer-*"))) == 2  # kept apart on disk too


def test_a_tokenizer_without_the_image_token_gets_it(hub_blip2, tmp_path):
    """Early revisions of the hub's BLIP-2 leave it to the processor."""
    learned = json.loads((hub_blip2 / "tokenizer.json").read_text())
    assert learned["added_tokens"].pop()["content"] == IMAGE_TOKEN
    early = shutil.copytree(hub_blip2, tmp_path / "early")
    (early / "tokenizer.json").write_text(json.dumps(learned))
    encoder = MLLM.from_pretrained(early, "BLIP-2").encoder
    assert encoder.image_id == AutoConfig.from_pretrained(hub_blip2).image_token_index


def test_a_tokenizer_of_another_revision_is_refused(hub_blip2, tmp_path):
    mixed, config = shutil.copytree(hub_blip2, tmp_path / "mixed"), AutoConfig.from_pretrained(hub_blip2)
    config.image_token_index += 1
    config.save_pretrained(mixed)
    with pytest.raises(ValueError, match="take both from one revision"):
        MLLM.from_pretrained(mixed, "BLIP-2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers(composed, hub_blip2, records, dtype):
    queries = [Query("What is it?", records[0].edit.image), Query("What is it?")]
    for folder in (composed, hub_blip2):
        mllm = MLLM.from_pretrained(folder, "half", dtype=dtype)
        assert len(mllm.answer(queries)) == 2
        assert all(f.top.shape[1] == 10 for f in mllm.force(queries, ["a kite", "a kite"]))


def test_an_answer_ends_where_the_next_turn_begins(hub_blip2, composed, records, monkeypatch):
    spoken = {hub_blip2: " a kite\nQuestion: what", composed: "a kite###Human: <Img>"}
    for folder, text in spoken.items():
        mllm = MLLM.from_pretrained(folder, "stop")
        monkeypatch.setattr(mllm.tokenizer, "batch_decode", lambda *_, text=text, **__: [text])
        assert mllm.answer([Query("What is it?", records[0].edit.image)]) == ["a kite"]
