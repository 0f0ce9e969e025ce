"""One peer library's TopK training step in a process of its own; `saelab.kernels.bench.peers` starts it and talks to it.

One JSON object a line, both ways. First comes the shape: `{"d_in", "d_sae", "k", "batch", "threads", "path"}`; the answer
is `{"version"}`. Then each `{"step": true}` takes the batch that lies in the file `path` (raw float32), is timed here, and
is answered by `{"seconds", "loss"}`. `{"error"}` is the last answer of a peer that raised. Imports torch and the peer only.

Where a library has a method or function that trains on one batch, that is what runs. All else is left at the library's
default: learning rate, schedule, clip, auxiliary loss, how a step is counted.
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
"""Steps that a run would have: the end of a learning rate's schedule is never reached."""


class Plain:
    """A TopK SAE of ten lines with Adam. No library: it is here to test the pipe."""

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
    """`SAETrainer.step` on a `TopKTrainingSAE`, and the step count that `SAETrainer.fit` adds.

    Forward, squared error, AuxK once a feature is dead (1,000 steps), firing counters, backward, clip to norm 1, Adam,
    schedulers. The decoder is not normalised: by default activations are rescaled by its norms. Nothing is logged.
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
    decoder's gradient, clip to norm 1, Adam, scheduler, unit norms. Its first step sets `b_dec` to a geometric median.
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
    """The steps of `Trainer.fit` for one SAE, written out: `fit` itself needs a language model and gives no batch away.

    In its order: `b_dec` from the first batch, unit norms, total variance, `SparseCoder.forward`, fired mask, FVU,
    backward (AuxK has weight 0 by default), projection of the decoder's gradient, schedule-free signum, token counts.
    Left out: what `fit` does with hooks, token masks and files. Its bfloat16 autocast is for CUDA only.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = (
            "1"  # its Triton decoder takes CUDA tensors only, and is chosen at import
        )
        from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
        from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]

        self.version, self.steps = importlib.metadata.version("eai-sparsify"), 0
        torch.set_float32_matmul_precision("high")  # the first line of `fit`
        self.sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), dtype=torch.float32)
        signs = SignSGD([{"params": self.sae.parameters(), "lr": 5e-3 / (d_sae / 2**14) ** 0.5}])
        self.optimizer = ScheduleFreeWrapper(signs, momentum=0.95)
        self.optimizer.train()
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long)
        self.fired = torch.zeros(d_sae, dtype=torch.bool)

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

    Forward, mean squared error (AuxK is a choice there, no default), dead code tracker, backward, clip to norm 1, Adam, R2,
    L0 and loss for its log (`monitoring=1`, the default); the decoder's unit norms are restored in each forward.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, batch: int) -> None:
        # The package's own __init__ imports plots and image models: 0.3.0 fails there beside matplotlib 3.9 and later.
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
    """Serve until the input ends. What a library prints goes to stderr, so that nothing stands between the answers."""
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
