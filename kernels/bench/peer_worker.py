"""Worker process that runs one peer library's TopK training step, started by `saelab.kernels.bench.peers`.

The protocol is one JSON object per line, in both directions. The first request is the shape, `{"d_in", "d_sae", "k", "batch",
"threads", "path"}`, and is answered by `{"version"}`. Each following `{"step": true}` runs and times one step on the batch in
the file `path` (raw float32) and is answered by `{"seconds", "loss"}`. A peer that raises answers `{"error"}` and exits. Only
torch and the peer are imported.

If a library has a method or function that trains on one batch, that is what runs. Everything else uses the library's defaults:
learning rate, schedule, clipping, auxiliary loss, step counting.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback

import torch
from torch import Tensor, nn

MANY = 10**6
"""Length of the run in steps, so long that the end of a learning rate schedule is never reached."""


class Plain:
    """A minimal TopK SAE with Adam; no library, used to test the protocol."""

    version = torch.__version__

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int) -> None:
        self.k, self.encoder, self.decoder = k, nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in)
        self.adam = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()])

    def step(self, x: Tensor) -> float:
        top = self.encoder(x).topk(self.k)
        feature_acts = x.new_zeros(len(x), self.encoder.out_features).scatter(1, top.indices, top.values.relu())
        loss = (self.decoder(feature_acts) - x).square().mean()
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return loss.item()


class SaeLens:
    """`SAETrainer.step` on a `TopKTrainingSAE`, and the step counter of `SAETrainer.fit`.

    Forward, squared error, AuxK once a feature is dead (1,000 steps), firing counters, backward, clipping to norm 1, Adam,
    schedulers. The decoder is not normalised; by default activations are rescaled by its norms. Nothing is logged.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        self.version = importlib.metadata.version("sae-lens")
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
        settings = SAETrainerConfig(
            total_training_samples=MANY * batch, train_batch_size_samples=batch, lr_end=3e-5
        )  # lr_end: a tenth of the default rate, as its runner sets it; the default schedule is constant
        self.trainer = SAETrainer(settings, sae, iter(()))

    def step(self, x: Tensor) -> float:
        output = self.trainer.step(x)
        self.trainer.n_training_steps += 1
        return output.loss.item()


class DictionaryLearning:
    """`TopKTrainer.update`.

    Forward, squared error, AuxK once a feature is dead (10 million tokens), firing counters, backward, projection of the
    decoder's gradient, clipping to norm 1, Adam, scheduler, unit norms. The first step sets `b_dec` to a geometric median.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

        self.version, self.steps = importlib.metadata.version("dictionary-learning"), 0
        self.trainer = TopKTrainer(
            steps=MANY, activation_dim=d_in, dict_size=d_sae, k=k, layer=0, lm_name="none", device="cpu"
        )

    def step(self, x: Tensor) -> float:
        loss = self.trainer.update(self.steps, x)
        self.steps += 1
        return loss


class Sparsify:
    """The step of `Trainer.fit` for one SAE, written out: `fit` itself needs a language model and does not accept batches.

    In its order: `b_dec` from the first batch, unit norms, total variance, `SparseCoder.forward`, fired mask, FVU,
    backward (AuxK has weight 0 by default), projection of the decoder's gradient, schedule-free signum, token counts.
    Omitted: what `fit` does with hooks, token masks and files. On CUDA its forward pass is under bfloat16 autocast and its
    decoder is a Triton kernel.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int, device: str = "cpu") -> None:
        if device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder, chosen at import, takes CUDA tensors only
        from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
        from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]

        self.version, self.steps = importlib.metadata.version("eai-sparsify"), 0
        torch.set_float32_matmul_precision("high")  # the first line of `fit`
        self.sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=device, dtype=torch.float32)
        signs = SignSGD([{"params": self.sae.parameters(), "lr": 5e-3 / (d_sae / 2**14) ** 0.5}])
        self.optimizer = ScheduleFreeWrapper(signs, momentum=0.95)
        self.optimizer.train()
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def step(self, x: Tensor) -> float:
        if self.steps == 0:
            self.sae.b_dec.data = x.mean(0)
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        loss = float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[self.fired] = 0
        self.fired.zero_()
        self.steps += 1
        return loss


class Overcomplete:
    """`train_sae` with a data loader of one batch, on a `TopKSAE`, with the loss and optimiser of the library's README.

    Forward, mean squared error (AuxK is optional there, not the default), dead code tracker, backward, clipping to norm 1,
    Adam, R2, L0 and loss for its log (`monitoring=1`, the default); each forward pass renormalises the decoder.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int) -> None:
        # The package's own __init__ imports plots and image models, which fails in 0.3.0 with matplotlib 3.9 and later.
        spec = importlib.util.find_spec("overcomplete")
        if spec is None:
            raise ModuleNotFoundError("No module named 'overcomplete'")
        sys.modules["overcomplete"] = importlib.util.module_from_spec(spec)
        from overcomplete.sae import TopKSAE, train_sae  # pyright: ignore[reportMissingImports]

        self.version, self.train = importlib.metadata.version("overcomplete"), train_sae
        self.sae = TopKSAE(d_in, nb_concepts=d_sae, top_k=k)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=5e-4)

    def step(self, x: Tensor) -> float:
        return self.train(self.sae, [x], _mean_square, self.adam, nb_epochs=1)["step_loss"][0]


def _mean_square(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    return (x - x_hat).square().mean()


PEERS = {
    "plain": Plain,
    "sae-lens": SaeLens,
    "dictionary-learning": DictionaryLearning,
    "eai-sparsify": Sparsify,
    "overcomplete": Overcomplete,
}


def main(name: str) -> None:
    """Serve until stdin closes. The library's output is redirected to stderr, so that stdout holds only answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for answer in _answers(name):
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).splitlines() or [f"{place.line} (line {place.lineno} of {place.name})"])[0]
        print(json.dumps({"error": f"{type(error).__name__}: {message}"}), file=answers, flush=True)
        raise SystemExit(1) from error


def _answers(name: str):
    """Yield the version, then the seconds and loss of every step."""
    shape = json.loads(sys.stdin.readline())
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    batch, d_in = shape["batch"], shape["d_in"]
    peer = PEERS[name](d_in, shape["d_sae"], shape["k"], batch)
    yield {"version": peer.version}
    for _ in iter(sys.stdin.readline, ""):
        x = torch.from_file(shape["path"], size=batch * d_in, dtype=torch.float32).reshape(batch, d_in).clone()
        start = time.perf_counter()
        loss = peer.step(x)
        seconds = time.perf_counter() - start
        if not abs(loss) < float("inf"):
            raise ArithmeticError(f"the loss is {loss}")
        yield {"seconds": seconds, "loss": loss}


if __name__ == "__main__":
    main(sys.argv[1])
