"""Whether two commits compute the same bits: what each makes of one seed, file by file.

    python tests/same_bits.py main HEAD
    python tests/same_bits.py HEAD .          # a dot: the files as they are, committed or not

Each commit harvests 4,096 rows of a tiny Llama, trains every variant for 30 steps, evaluates one SAE and collects its
features, in a process of its own, by public names alone. Times, paths and versions do not count; everything else does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
FORGOTTEN = {
    "seconds", "tokens_per_second", "time", "when", "created", "path", "folder", "name", "source", "versions", "torch",
    "saelab", "saelab_version", "version", "rules", "texts",
}  # fmt: skip
SKIPPED = {"golden.safetensors"}


def tiny_model() -> Any:
    """A random Llama of three layers with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(vocab), max_position_embeddings=128, bos_token_id=0, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def make(out: Path) -> None:
    """Everything that is compared, into `out`."""
    import torch

    import saelab

    torch.set_num_threads(1)
    lm = saelab.load_model(*tiny_model(), dtype=torch.float32, device="cpu")
    words = [
        "the",
        "river",
        "runs",
        "past",
        "an",
        "old",
        "mill",
        "where",
        "nobody",
        "came",
        "to",
        "see",
        "what",
        "the",
        "light",
        "of",
        "morning",
        "had",
        "made",
    ]
    texts = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) + f" {i}." for i in range(60)]
    options: dict[str, Any] = {"ctx_len": 64, "batch_size": 4, "shard_rows": 512, "pool_shards": 2, "progress": False}
    cache = saelab.harvest(lm, texts, HOOKS, n_tokens=4_096, out_dir=out / "cache", **options)
    train = saelab.TrainConfig(n_tokens=30 * 128, batch_size=128, seed=1, device="cpu", checkpoint_every=20)
    for name, variant in saelab.VARIANTS.items():
        if getattr(variant, "needs_gradients", False):
            continue
        fields = {"hook_names": HOOKS} if name.startswith("cross") else {"hook_name_out": HOOKS[1]}
        known = {field: value for field, value in fields.items() if field in variant.Config.__dataclass_fields__}
        hook: dict[str, Any] = {} if name.startswith("cross") else {"hook_name": HOOKS[0]}
        config = variant.Config(d_sae=64, **known)
        sae = saelab.train(config, cache, train, out / name / "sae", progress=False, **hook)
        if name in ("topk", "abs_topk", "jumprelu", "crosscoder"):
            saelab.evaluate(sae, lm, texts, n_tokens_ce=256, path=out / name / "report.json", progress=False)
        if name in ("topk", "abs_topk"):
            saelab.collect_features(sae, lm, texts, out_dir=out / name / "features", progress=False)


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of what each file says, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in SKIPPED)
    return {str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest() for path in files}


def content(path: Path) -> bytes:
    """The bytes of a file without what two runs of one commit may differ in."""
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return "\n".join(json.dumps(lasting(json.loads(line)), sort_keys=True) for line in lines).encode()
    if path.suffix == ".json":
        return json.dumps(lasting(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
    if path.suffix == ".sqlite":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
            return "\n".join(base.iterdump()).encode()
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        return json.dumps(lasting(parsed(json.loads(data[8:size]))), sort_keys=True).encode() + data[size:]
    return path.read_bytes()


def parsed(value: Any) -> Any:
    """The JSON that strings of a tensor file's metadata hold."""
    if isinstance(value, dict):
        return {key: parsed(one) for key, one in value.items()}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def lasting(value: Any) -> Any:
    """JSON without times, paths and versions, nor the hashes of files that hold such."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in FORGOTTEN and not is_file(one)}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def is_file(value: Any) -> bool:
    return isinstance(value, dict) and {"sha256", "bytes"} <= value.keys()


def made_by(commit: str, scratch: Path) -> dict[str, str]:
    """Fingerprints of what `commit` makes, in a checkout of its own."""
    tree = ROOT
    if commit != ".":
        tree = scratch / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), commit], cwd=ROOT, check=True)
    try:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        script = [sys.executable, str(Path(__file__).resolve()), "--make", str(scratch / "out")]
        subprocess.run(script, cwd=scratch, env=environment, check=True)
    finally:
        if tree != ROOT:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return fingerprints(scratch / "out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make)
        return 0
    if len(arguments.commits) != 2:
        parser.error("give two commits")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        before, after = (made_by(c, Path(folder)) for c, folder in zip(arguments.commits, (one, other), strict=True))
    different = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    for name in different:
        print(f"differs: {name}" if name in before and name in after else f"in one alone: {name}")
    print(f"{len(before)} and {len(after)} files, {len(different)} differ.")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
