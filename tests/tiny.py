"""Tiny models in the real formats, loaded through the real entry points; a dozen real records.

A test module gets these fixtures by ``pytest_plugins = ["tiny"]``; each is made once a session.
"""

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import Blip2VisionModel

from mscke.benchmark.generate import generate
from mscke.benchmark.load import load_records
from mscke.classifier import ScopeClassifier
from mscke.models.clip import ClipEncoder
from mscke.models.mllm import MLLM
from mscke.models.tiny import write_clip
from mscke.pretraining import bridge, clip, language, text

torch.set_num_threads(1)  # tensors this small gain nothing from a second thread; waiting for it costs
WIDTH = 32
N_RECORDS = 12


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """FGVEdit-Scenes' first records, each on an image of its own."""
    root = tmp_path_factory.mktemp("data")
    return load_records(generate(root, "train", N_RECORDS), root).records


@pytest.fixture(scope="session")
def clip_name(tmp_path_factory):
    """A CLIP of random weights, saved as the mini CLIPs are: what ``open_clip.create_model`` takes."""
    folder = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.SIZES, "clip-mini-b", (WIDTH, 2, 1))
        clip.write_config(folder, "clip-mini-b")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def openai_name(tmp_path_factory):
    """A CLIP of random weights with OpenAI's own tokenizer, as open_clip has it on the hub."""
    folder = tmp_path_factory.mktemp("openai") / "clip"
    write_clip(folder, 32)
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def encoder(clip_name):
    return ClipEncoder(clip_name)


def build_mllms() -> dict:
    """Models of random weights by family; MiniGPT-4 has BLIP-2's vision tower and Q-Former, as it should."""
    tokenizer = text.build_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WIDTH": WIDTH, "LAYERS": 2, "HEADS": 2}.items():
            patch.setattr(language, name, value)
        patch.setattr(bridge, "VISION_WIDTH", WIDTH)
        torch.manual_seed(1)
        tower = Blip2VisionModel(bridge.vision_config())
        texts = {family: language.text_model(family, tokenizer) for family in ("opt", "llama")}
        models = {family: bridge.assemble(tower, lm, tokenizer) for family, lm in texts.items()}
    models["llama"].qformer.load_state_dict(models["opt"].qformer.state_dict())
    with torch.no_grad():
        models["llama"].query_tokens.copy_(models["opt"].query_tokens)
        for model in models.values():  # strong layers and vision: tied embeddings would repeat the last word
            model.language_projection.weight.mul_(4)
            for name, parameter in model.language_model.named_parameters():
                if ".layers." in name and parameter.ndim == 2:
                    parameter.mul_(4)
    return models


@pytest.fixture(scope="session")
def mllm_folders(tmp_path_factory):
    """Folders of saved models by family, written as the pretraining writes its own."""
    folders = {}
    for family, model in build_mllms().items():
        folders[family] = tmp_path_factory.mktemp(family)
        model.half().save_pretrained(folders[family])
        text.build_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def blip2(mllm_folders):
    return MLLM.from_pretrained(mllm_folders["opt"], "BLIP-2-tiny")


@pytest.fixture(scope="session")
def minigpt4(mllm_folders):
    return MLLM.from_pretrained(mllm_folders["llama"], "MiniGPT-4-tiny")


@pytest.fixture(scope="session", params=["opt", "llama"])
def mllm(request):
    """BLIP-2, then MiniGPT-4."""
    return request.getfixturevalue({"opt": "blip2", "llama": "minigpt4"}[request.param])


@pytest.fixture(scope="session")
def queries(records):
    """All queries of all records, those with an image and those of text alone mixed."""
    return [query for record in records for query in record.queries.values()]


@pytest.fixture(scope="session")
def gold(records):
    """The answer to each of ``queries`` after its record's edit."""
    return [answer for record in records for answer in record.answers.values()]


@pytest.fixture(scope="module")
def classifier(clip_name, encoder):
    """A fresh scope classifier on ``encoder``; a file whose tests need another has its own."""
    torch.manual_seed(8)
    return ScopeClassifier(clip_name, width=16, encoder=encoder).eval()
