"""Loading language models: the embedded default, a Hugging Face id, a folder, or an object that is already built.

The only file that imports transformer_lens; transformers is imported only here and in `tiny`.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saelab.errors import ModelError
from saelab.kernels.allocator import keep_freed_memory
from saelab.kernels.dispatch import fast_bf16
from saelab.models.language_model import LanguageModel
from saelab.models.smollm2 import smollm2_folder
from saelab.models.steered import Edit

_LOG = logging.getLogger("saelab.models")

__all__ = ["Edit", "LanguageModel", "load_model"]


def load_model(
    source: Any,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> LanguageModel:
    """Load a causal language model.

    `source` is "smollm2" (embedded, fetched once), a Hugging Face id, a local folder, or a built `PreTrainedModel` or
    `TransformerBridge` (used as is, always without dropout, and never changed: its `requires_grad` flags and training
    mode are kept; with another `dtype` or `device`, a copy of it). `dtype` defaults to bf16 if the CPU or GPU computes it
    fast, else fp32; the choice is logged. Hub variables (`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`) are honoured. Raises
    `ModelError` if the model cannot be fetched or read, is not a causal language model, or has layers that saelab cannot
    hook: it is run once to find out.
    """
    keep_freed_memory()
    if not isinstance(source, (str, Path)):
        return _wrap(source, tokenizer, dtype, device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    why = "" if dtype else (", fast here" if fast_bf16(device) else ", bf16 is not fast here")
    dtype = dtype or (torch.bfloat16 if fast_bf16(device) else torch.float32)
    name, where = _locate(source)
    lm = _read(name, where, tokenizer, dtype, device)
    _LOG.info(f"{lm!r}{why} (dtype= overrides)")
    return lm


def _locate(source: str | Path) -> tuple[str, str | Path]:
    """The model's name, and the folder or hub id to read it from."""
    if source == "smollm2":
        return "smollm2", smollm2_folder(_convert_gguf)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is not a model folder: it has no config.json. Give one that `save_pretrained` wrote."
            )
        return str(path.resolve()), path.resolve()
    if isinstance(source, Path) or path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        kind = "a file" if path.exists() else "neither a folder here nor a Hugging Face id"
        raise ModelError(f"Unknown model {str(source)!r}: it is {kind}. Give 'smollm2', a model folder or a hub id.")
    return source, source


def _read(name: str, where: str | Path, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(where)
                tokenizer.model_max_length = int(1e30)  # saelab checks lengths itself; the tokenizer would only warn
    except Exception as error:  # the libraries raise OSError, ValueError, KeyError, SafetensorError, HTTP errors ...
        raise _unreadable(name, where, error) from error
    model = model.to(device).eval().requires_grad_(False)
    return _finish(model, tokenizer, name, _folder_of(where))


def _unreadable(name: str, where: str | Path, error: Exception) -> ModelError:
    said = " ".join(str(error).split())[:400] or type(error).__name__
    if name == "smollm2":
        fix = f"Delete {where} and load it again."
    elif isinstance(where, Path):
        fix = "Give a folder written by `save_pretrained` for a causal language model and its tokenizer."
    else:
        fix = (
            "Check the id and the network (HF_ENDPOINT chooses a mirror; HF_HUB_OFFLINE=1 allows only what is cached), "
            "or give 'smollm2' or a local folder."
        )
    return ModelError(f"The model {name!r} could not be loaded: {type(error).__name__}: {said}\n{fix}")


def _folder_of(where: str | Path) -> Path | None:
    """The folder the weights were read from: for a hub id, its snapshot in the hub's cache."""
    if isinstance(where, Path):
        return where
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(where, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _wrap(model: Any, tokenizer: Any, dtype: Any, device: Any) -> LanguageModel:
    """A `LanguageModel` around an object the caller has built."""
    if isinstance(model, type):
        raise ValueError(
            f"load_model got the class {model.__name__}; give an instance of it, or a folder or id to load one from."
        )
    is_bridge = hasattr(model, "hook_dict") and hasattr(model, "cfg")
    if not is_bridge and not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model_prefix")):
        raise ValueError(
            f"load_model got {type(model).__name__}; expected 'smollm2', a folder, a Hugging Face id, a "
            "PreTrainedModel or a TransformerBridge."
        )
    if not is_bridge and model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM.")
    weight = next(model.parameters())
    if (dtype or weight.dtype) != weight.dtype or torch.device(device or weight.device) != weight.device:
        model = copy.deepcopy(model).to(device or weight.device, dtype or weight.dtype)
    config = model.cfg if is_bridge else model.config
    name = getattr(config, "model_name" if is_bridge else "_name_or_path", "") or type(model).__name__
    return _finish(model, tokenizer or getattr(model, "tokenizer", None), name, None)


def _finish(model: Any, tokenizer: Any, name: str, folder: Path | None) -> LanguageModel:
    is_bridge = hasattr(model, "hook_dict")
    return LanguageModel(
        model, tokenizer, name, folder, boot_bridge=None if is_bridge else lambda: _boot_bridge(model, tokenizer)
    )


def _boot_bridge(model: Any, tokenizer: Any) -> Any:
    """A TransformerBridge over a copy of a Hugging Face model, raw weights (no folding)."""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        # The bridge reloads the tokenizer, which works only for one read from disk; without one it would use the network.
        (_tokenizer_of_nothing() if tokenizer is None else tokenizer).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        weight = next(model.parameters())
        return TransformerBridge.boot_transformers(
            model.config.model_type,
            hf_model=copy.deepcopy(model).eval().requires_grad_(False),
            tokenizer=tokenizer,
            device=str(weight.device),
            dtype=weight.dtype,
        )


def _tokenizer_of_nothing() -> Any:
    """A stub, for a model that reads token ids only."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    one = "<unk>"
    words = Tokenizer(WordLevel({one: 0}, unk_token=one))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=one, bos_token=one, eos_token=one, pad_token=one)


def _convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file to fp32 safetensors plus tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        delattr(model.config, "quantization_config")  # the saved weights are plain numbers
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, name):
                delattr(model, name)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' warnings and progress bars, except for downloads. Errors propagate."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_quiet = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not hub_quiet:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
