"""Does steering promote the tokens a feature's logits predict? Ten features against random directions of equal norm.

Run: python examples/steering_effect.py [RUN]    (RUN holds features, runs/demo by default; about a minute on two cores)
"""

import sys

import saelab
from saelab.steering.effect_table import effect_table


def main() -> None:
    store = saelab.load_features(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    effect_table(saelab.load_model(store.manifest["model"]["name"]), store)


if __name__ == "__main__":
    main()
