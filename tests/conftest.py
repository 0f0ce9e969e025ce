"""Fixtures shared by all tests: a tiny random Llama with its own tokenizer on disk, and the real embedded model."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
from pathlib import Path

import interpreter
import pytest
import runtime_types
import torch
from browser import browser_context, chromium, page, server  # noqa: F401
from pages import open_page  # noqa: F401

runtime_types.install()  # before saelab is imported, which the import hook then decorates with it

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test may reach the real hub: the hub tests set their own endpoint in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_TEXT = [
    "The weather today is fine, and the river runs quietly past the old mill.",
    "In the beginning there was the word; it came to pass that the light was good.",
    "def main(argument): return argument + 1  # the end of the function",
    "She said that the house on the hill was sold to the man with the red hat.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


# The longest first.
LONG_FILES = [
    *("test_compile_report", "test_readme", "test_examples", "test_cli", "test_family", "test_synthetic"),
    *("test_training", "test_browser", "test_dispatch", "test_sweep", "test_crash", "test_variants_everywhere"),
    *(
        "test_distributed_batches",
        "test_distributed_features",
        "test_families",
        "test_family_hooks",
        "test_variant_training",
    ),
    *("test_torchrun_harvest", "test_triton_screen", "test_kernel_benches", "test_hub", "test_interop_hub"),
]


@pytest.fixture(scope="module")
def models_load_in_fp32():
    """As the tests' own models are: on a machine with fast bf16, commands and pages would load them in bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelab.models.loading.fast_bf16", lambda device: False)
        yield


def pytest_sessionstart():
    """A shell ignores Ctrl-C for what it runs in the background, and children inherit that; here tests press it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that no process ends up alone with one of them."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    """Where a test file has imported Triton, its interpreter is made faster; another file's tests may do without."""
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        interpreter.replace_once()


def build_tokenizer():
    """A byte-level BPE tokenizer of 300 tokens: every text can be written, `<s>` is BOS (not added by itself)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def with_eos(tokenizer, token_id: int):
    """The same tokenizer with this token as EOS."""
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(token_id)
    return other


def build_tiny_llama(folder: Path, n_layers: int = 3, seed: int = 0, positions: int = 128) -> Path:
    """Save a random Llama (d_model 32, 4 heads, fp32) and its tokenizer in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=0,  # <s>
        eos_token_id=1,  # <|endoftext|>
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder with a tiny random Llama: 3 layers, d_model 32, 4 heads, 300 tokens, 128 positions."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory) -> Path:
    """As `tiny_folder`, with 16 layers and 256 positions: it has the hooks that examples and README name."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "deep-llama", n_layers=16, positions=256)


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder):
    """The tiny Llama as a `LanguageModel` in fp32 on the CPU."""
    from saelab.models import load_model

    return load_model(tiny_folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def smollm2():
    """The real embedded model (fetched once into the user's cache folder), in the dtype users get."""
    from saelab.models import load_model

    return load_model("smollm2")


# Text that would run, break out, reorder or hide itself if a page forgot to escape it.
HOSTILE = [
    "<script>alert('saelab-1')</script>",
    "<img src=x onerror=alert('saelab-2')>",
    "\"><svg onload=alert('saelab-3')>",
    "' onfocus='alert(4)' autofocus tabindex=1 x='",
    "</div></style></textarea></script><iframe src=javascript:alert(5)>",
    "[link](javascript:alert(6)) ![picture](http://example.com/x.png) **bold** `code` $x^2$ :material/bug_report:",
    "{{7*7}} ${alert(8)} <%= 9 %> &lt;script&gt; &#60;b&#62;",
    "\u202eright to left\u202c \u2066isolate\u2069 zero\u200bwidth\u200d \ufeff \u2028 \x07\x1b[31m \r\n\ttab",
    "\u6f22\u5b57\u304b\u306a \ud55c\uad6d\uc5b4 \u0639\u0631\u0628\u064a \U0001f600 "
    "\U0001f469\u200d\U0001f680 e\u0301",
]


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory, tiny_lm) -> Path:
    """A whole run on the tiny model, cache to features, whose documents all hold hostile text. Do not change it."""
    import json

    import saelab

    folder = tmp_path_factory.mktemp("runs") / "hostile"
    folder.mkdir()
    texts = folder / "texts.jsonl"
    documents = [f"{HOSTILE[i % len(HOSTILE)]} {TOKENIZER_TEXT[i % 4]} Number {i}." for i in range(360)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    hook = "blocks.1.hook_resid_post"
    cache = saelab.harvest(tiny_lm, texts, [hook], 12_000, folder / "cache", ctx_len=64, progress=False)
    config = saelab.saes.TopKConfig(d_sae=96, k=4)
    train = saelab.TrainConfig(n_tokens=30_000, batch_size=256, warmup_steps=5, checkpoint_every=0, device="cpu")
    sae = saelab.train(config, cache, train, folder / "sae", progress=False)
    assert isinstance(sae, saelab.saes.SAE)
    saelab.evaluate(sae, tiny_lm, n_tokens_ce=512, progress=False).save(folder / "report.json")
    saelab.collect_features(sae, tiny_lm, out_dir=folder / "features", progress=False)
    return folder


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton kernels run: compiled on a GPU, else in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def cpu_alone(request, monkeypatch):
    """Tests that do not ask for `device` speak of tensors on the CPU: where there is a GPU, they do not see it."""
    if "device" not in request.fixturenames and torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def counted_anew():
    """The first calls of every function in every test are checked against their annotations."""
    runtime_types.begin_test()


@pytest.fixture(autouse=True)
def messages():
    """What the library logs is shown as the command line shows it, for `capsys` to read."""
    from saelab.cli.messages import shown

    with shown():
        yield


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Uninitialised memory is NaN, or the largest integer: an element that nobody wrote shows, and so does its use."""

    def poisoned(allocate):
        def filled(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def reversed_grid():
    """`with reversed_grid():` the interpreter runs the programs of a launch from the last to the first."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("only the interpreter's order of programs can be chosen")
    from triton.runtime.interpreter import interpreter_builder as builder

    @contextlib.contextmanager
    def backwards():
        forwards = builder.set_grid_idx
        with pytest.MonkeyPatch.context() as patch:
            place = lambda *ids: forwards(*(n - 1 - i for n, i in zip(builder.grid_dim, ids, strict=True)))  # noqa: E731
            patch.setattr(builder, "set_grid_idx", place)
            yield

    return backwards


@pytest.fixture(scope="module")
def early_norm_rule():
    """Shards are written only once the limit on norms is known: after 300 rows here, not 16,384."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelab.tokens.mask.NORM_RULE_ROWS", 300)
        yield
