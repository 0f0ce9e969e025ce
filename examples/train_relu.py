"""Train a ReLU SAE and a TopK SAE side by side on the same batches of a small cache; compare them on held-out text.

Run: python examples/train_relu.py [RUN]    (about a minute on two cores)
"""

import sys

import saelab

RUN = sys.argv[1] if len(sys.argv) > 1 else "runs/relu"
HOOK = "blocks.8.hook_resid_post"


def main() -> None:
    lm = saelab.load_model("smollm2")
    cache = saelab.harvest(lm, saelab.load_texts("demo"), hook_names=[HOOK], n_tokens=16_000, out_dir=f"{RUN}/cache")
    saes = saelab.train(
        [saelab.saes.ReLUConfig(d_sae=1024, target_l0=32.0), saelab.saes.TopKConfig(d_sae=1024, k=32)],
        cache,
        saelab.TrainConfig(n_tokens=120_000, batch_size=1024),
        out_dir=RUN,
    )
    for sae in saes:
        report = saelab.evaluate(sae, lm, n_tokens=8_000, n_tokens_ce=1_000)
        print(f"{sae.variant:<5} fvu {report.fvu:.3f}  l0 {report.l0:.1f}  recovered {report.ce_loss_recovered:.3f}")


if __name__ == "__main__":
    main()
