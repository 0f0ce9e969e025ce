"""The sub-commands of `saelab`: thin functions around the public API.

RUN is a folder with cache/, sae/ (or several sae-NAME/), features/ and report.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from saelab.cli.answers import AsJson, answering
from saelab.cli.bench_commands import LOSS_TOKENS, bench, sweep
from saelab.cli.cache_commands import cache
from saelab.cli.demo import demo
from saelab.hints.next_commands import after_training, check_is_run, one_of, trainings
from saelab.run_folder.opening import load_lm, with_model

Run = Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, or that of one of its trained SAEs.")]
Model = Annotated[str, arg(help="smollm2, a Hugging Face id, or a model folder.")]
OwnModel = Annotated[str | None, arg(help="Language model; None means the one the SAE was trained on.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"] | None, arg(help="dtype of the language model; None: bfloat16 where that is fast.")
]
_SOURCES = "demo, concepts, a parquet, jsonl, csv or txt file, a save_to_disk folder, or a Hugging Face dataset id."
Texts = Annotated[str, arg(help=_SOURCES)]
_BOS = "Start every context with the BOS token (--no-prepend-bos: never); None follows the tokenizer."
Bos = Annotated[bool | None, arg(metavar="", help=_BOS)]
OwnTexts = Annotated[str | None, arg(help="Texts, as for harvest; None uses those the SAE was trained on.")]
Column = Annotated[str, arg(help="Column of the texts that holds strings or token ids.")]
Documents = Literal["train", "held_out", "all"]
Split = Annotated[
    Documents | None, arg(help="Which documents; None means held_out for the SAE's own texts and all for others.")
]


def harvest(
    run: Run,
    hook_name: Annotated[tuple[str, ...], arg(help="One or more hook names of the model.")],
    n_tokens: Annotated[int, arg(help="Tokens to read.")],
    model: Model = "smollm2",
    texts: Texts = "demo",
    column: Column = "text",
    split: Annotated[Documents, arg(help="Which documents.")] = "train",
    ctx_len: Annotated[int, arg(help="Tokens per context.")] = 256,
    batch_size: Annotated[int, arg(help="Contexts per forward pass.")] = 16,
    seed: Annotated[int, arg(help="Seed of the shuffle.")] = 0,
    prepend_bos: Bos = None,
    max_bytes: Annotated[int | None, arg(help="Refuse to build a larger cache.")] = None,
    dtype: Dtype = None,
    storage: Annotated[
        Literal["bfloat16", "float16", "int8"], arg(help="Storage format of the rows; int8 takes half the disk.")
    ] = "bfloat16",
    chat: Annotated[
        bool, arg(help="The column holds conversations: apply the chat template, one per context.")
    ] = False,
    block_contexts: Annotated[int | None, arg(help="Contexts per block of work, to split it among processes.")] = None,
    shuffle: Annotated[bool, arg(help="Shuffle the rows; otherwise they keep the order of the texts.")] = True,
    gradients: Annotated[bool, arg(help="Also store the gradient of the loss at each activation.")] = False,
) -> None:
    """Run a language model over texts and store the activations of its hooks in RUN/cache."""
    import saelab
    from saelab.distributed import is_main_process, set_local_device

    check_is_run(run)
    set_local_device()
    options: dict[str, Any] = {"hook_names": list(hook_name), "n_tokens": n_tokens, "out_dir": run / "cache"}
    options |= {"ctx_len": ctx_len, "batch_size": batch_size, "seed": seed, "split": split, "prepend_bos": prepend_bos}
    options |= {"max_bytes": max_bytes, "storage": storage, "shuffle": shuffle, "chat": chat, "gradients": gradients}
    options |= {"block_contexts": block_contexts, "progress": is_main_process()}
    template = load_lm(model, dtype) if chat else None
    corpus = saelab.load_texts(texts, column=column, chat=template)  # before the model, which takes longer to load
    cache = saelab.harvest(template or load_lm(model, dtype), corpus, **options)
    if options["progress"]:
        print(f"{cache.n_rows:,} activations of {', '.join(cache.hook_names)} are in {run / 'cache'}")
        print(one_of(trainings(run)))


@dataclass(frozen=True)
class StreamFlags:
    """Flags of `saelab train --stream`, the same as those of `harvest`."""

    model: Model = "smollm2"
    texts: Texts = "demo"
    column: Column = "text"
    split: Annotated[Documents, arg(help="Which documents.")] = "train"
    ctx_len: Annotated[int, arg(help="Tokens per context.")] = 256
    prepend_bos: Bos = None
    dtype: Dtype = None


def train(
    run: Path,
    variant: str,
    name: str | None,
    hook_name: str | None,
    wandb_project: str | None,
    config: Any,
    train: Any,
    control: Path | None = None,
    stream: tuple[str, ...] = (),
    reading: StreamFlags | None = None,
) -> None:
    """Train an SAE on RUN/cache, or harvest while training with --stream; writes RUN/sae, or RUN/sae-NAME with --name."""
    import saelab
    from saelab.distributed import is_main_process
    from saelab.runs import named_sae

    check_is_run(run)
    folder = named_sae(run, name)
    data = run / "cache" if reading is None else _open_stream(stream, **asdict(reading))
    other = None if control is None else control / "cache"
    saelab.train(config, data, train, out_dir=folder, hook_name=hook_name, control=other, wandb_project=wandb_project)
    if not is_main_process():
        return
    print(f"The {variant} SAE is in {folder}")
    print(after_training(folder))


def _open_stream(hooks: tuple[str, ...], model: str, texts: str, column: str, dtype: str | None, **options: Any) -> Any:
    import saelab
    from saelab.activation_cache.streaming import stream

    corpus = saelab.load_texts(texts, column=column)  # before the model, which takes longer to load
    return stream(load_lm(model, dtype), corpus, list(hooks), **options)


def evaluate(
    run: Run,
    model: OwnModel = None,
    texts: OwnTexts = None,
    column: Column = "text",
    split: Split = None,
    as_json: AsJson = False,
    allow_train: Annotated[bool, arg(help="Score documents the SAE was trained on instead of refusing.")] = False,
    n_tokens: Annotated[int | None, arg(help="Maximum number of tokens to score; None means all of them.")] = None,
    n_tokens_ce: Annotated[int, arg(help=LOSS_TOKENS)] = 4096,
    dtype: Dtype = None,
) -> None:
    """Evaluate the SAEs of RUN on held-out text; writes a report.json for each."""
    import saelab

    with answering(as_json) as answer:
        runs = runs_of(run, one=as_json)
        corpus = saelab.load_texts(texts, column=column) if texts else None
        options: dict[str, Any] = {"split": split, "allow_train": allow_train, "n_tokens": n_tokens}
        options["n_tokens_ce"] = n_tokens_ce
        for found in runs:
            sae, lm = with_model(found.sae_dir, model, dtype)
            report = saelab.evaluate(sae, lm, corpus, path=found.report_path, **options)
            kept = [*_other_tokens(report, n_tokens_ce), f"The report is in {found.report_path}"]
            answer(json.loads(report.to_json()), str(report), *kept)


def _other_tokens(report: Any, asked: int) -> list[str]:
    """How many tokens the loss was measured on, where that is not as many as were asked for."""
    n = report.n_tokens_ce
    if n == asked:
        return []
    why = f"the whole contexts that hold the {asked:,} asked for" if n > asked else f"all that were read, not {asked:,}"
    return [f"The loss was measured on {n:,} tokens, {why}."]


def dash(
    run: Annotated[Positional[Path | None], arg(metavar="RUN", help="Run folder; None: the only one in runs/.")] = None,
    port: Annotated[int, arg(help="Port on 127.0.0.1.")] = 8501,
    browser: Annotated[bool, arg(help="Open the page in a browser.")] = False,
) -> None:
    """Serve the dashboard of RUN on 127.0.0.1 until Ctrl-C."""
    from saelab.app.serve import serve
    from saelab.runs import only_run

    serve(run or only_run(Path("runs")), port=port, browser=browser)


def runs_of(run: Path, *, one: bool = False) -> list[Any]:
    """The SAEs of RUN. Raises `ValueError` where it holds several and `one` is wanted, for --json."""
    from saelab.runs import find_saes

    found = find_saes(run)
    if one and len(found) > 1:
        names = ", ".join(str(each.sae_dir) for each in found)
        raise ValueError(f"--json prints one object, but {run} holds {len(found)} SAEs; name one of {names}")
    return found


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "demo": (demo, "saelab demo\nsaelab demo --no-serve --out-dir runs/demo"),
    "harvest": (
        harvest,
        "saelab harvest runs/mlp --hook-name blocks.14.hook_mlp_out --n-tokens 250_000\n"
        "saelab harvest runs/own --texts notes.jsonl --column body --hook-name blocks.9.hook_resid_post "
        "--n-tokens 1_000_000",
    ),
    "train": (
        train,
        "saelab train runs/mlp --d-sae 4096 --k 32 --n-tokens 2_000_000\n"
        "saelab train runs/mlp --name l1 --variant relu --d-sae 4096 --l1-coefficient 5 --n-tokens 2_000_000\n"
        "saelab train runs/no-cache --stream blocks.14.hook_mlp_out --d-sae 4096 --k 32 --n-tokens 2_000_000",
    ),
    "sweep": (
        sweep,
        "saelab sweep runs/mlp --k 16 32 64 --n-tokens 2_000_000\n"
        "saelab sweep runs/mlp --variants topk batch_topk relu --k 16 32 --d-sae 4096 8192 --lr 1e-3 3e-3 --seeds 0 1 "
        "--n-tokens 2_000_000",
    ),
    "eval": (
        evaluate,
        "saelab eval runs/mlp\nsaelab eval runs/mlp/sae --json\nsaelab eval runs/mlp --texts concepts --n-tokens 20_000",
    ),
    "cache": (cache, "saelab cache info runs/demo\nsaelab cache verify runs/demo"),
    "dash": (dash, "saelab dash\nsaelab dash runs/demo\nsaelab dash runs/demo --port 8600"),
    "bench": (bench, "saelab bench synthetic\nsaelab bench family runs/demo"),
}
