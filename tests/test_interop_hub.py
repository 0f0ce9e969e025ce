"""SAEs on the hub, a local server: read at a commit, from the cache when offline, and what cannot be read says why."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign_saes import CASES
from local_hub import COMMIT, DEAD_END, Hub, run, serving

import saelab

SCOPE = "google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium"
READ = """
import json, logging, sys
import saelab
from saelab.errors import SaelabError

found = []
for source in sys.argv[1:]:
    try:
        sae = saelab.load_sae(source)
        found.append([sae.hash, sae.provenance.origin])
    except SaelabError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def read(sources: list[str], endpoint: str, home: Path, **more: str) -> list:
    return json.loads(run(READ.replace("sys.argv[1:]", repr(sources)), endpoint, home, **more))


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> Iterator[tuple[str, dict[str, Path]]]:
    """Address of a hub with SAEs of Gemma Scope 2's form, of sparsify's and of saelab's own."""
    folder = tmp_path_factory.mktemp("repos")
    scope = CASES["gemma_scope_2 resid_post/layer_9_width_16k_l0_medium, no config.json"](folder / "scope").path
    sparse = CASES["sparsify topk"](folder / "sparse").path
    saelab.save_sae(saelab.load_sae(scope), folder / "own" / "sae")
    found = {"models/google/gemma-scope-2-270m-pt": scope.parents[1], "models/tiny/sparse": sparse.parent}
    found["models/tiny/own"] = folder / "own"
    with serving(found) as address:
        yield address, {"scope": scope, "sparse": sparse, "own": folder / "own"}


@pytest.fixture(scope="module")
def fetched(repos, tmp_path_factory) -> tuple[Path, list]:
    home = tmp_path_factory.mktemp("hf_home")
    sources = [SCOPE, "tiny/sparse/layers.3.mlp", "tiny/own/sae", "google/gemma-scope-2-270m-pt"]
    return home, read(sources, repos[0], home)


def test_sources_are_read_at_their_commit(repos, fetched):
    (scope, origin), (sparse, sparse_origin), (own, own_origin), several = fetched[1]
    here = saelab.load_sae(repos[1]["scope"])
    assert scope == own == here.hash and sparse == saelab.load_sae(repos[1]["sparse"]).hash
    assert origin["imported"] | {"source": "", "revision": ""} == here.provenance.origin["imported"] | {
        "source": "",
        "revision": "",
    }
    assert (origin["imported"]["source"], origin["imported"]["revision"]) == (SCOPE, COMMIT)
    assert origin["hook_name"] == "blocks.9.hook_resid_post" and origin["model"] == {"name": "google/gemma-3-270m"}
    assert sparse_origin["model"] == {"name": "EleutherAI/pythia-70m"}  # from the config above the folder
    assert own_origin["hub"] == {"source": "tiny/own/sae", "revision": COMMIT}
    assert (
        "holds 1 SAEs: name one, such as google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium" in several
    )


def test_only_what_is_read_is_fetched(repos, fetched):
    got = [request for request in Hub.requests if request.startswith("GET /google/")]
    assert got == [
        f"GET /google/gemma-scope-2-270m-pt/resolve/{COMMIT}/resid_post/layer_9_width_16k_l0_medium/params.safetensors"
    ]


def test_what_was_fetched_is_read_offline(fetched):
    home, (scope, *_) = fetched
    again, other = read([SCOPE, "tiny/other/sae"], DEAD_END, home, HF_HUB_OFFLINE="1")
    assert again == scope
    assert "tiny/other/sae is not in the cache, and HF_HUB_OFFLINE is set: unset it to download" in other


def test_what_cannot_be_read_says_why(repos, tmp_path):
    missing, folder, nothing = read(["tiny/missing/sae", "tiny/sparse/layers.9", "no-such-folder"], repos[0], tmp_path)
    assert "there is no repository tiny/missing that you may read: check the name; for a private one log in" in missing
    assert "tiny/sparse has no layers.9; it has layers.3.mlp" in folder
    assert "no-such-folder does not exist, and is no id of the hub (org/repo/path)" in nothing
    Hub.gated.add("tiny/own")
    try:
        assert (
            "tiny/own is gated: ask for access on its page, then log in"
            in read(["tiny/own/sae"], repos[0], tmp_path)[0]
        )
    finally:
        Hub.gated.clear()
    (unreached,) = read([SCOPE], DEAD_END, tmp_path)
    assert "could not be read from the hub" in unreached and "check the network and HF_ENDPOINT" in unreached


def test_a_local_path_wins(repos, tmp_path, monkeypatch):
    folder = tmp_path / "tiny" / "own"
    saelab.save_sae(saelab.load_sae(repos[1]["sparse"]), folder)
    monkeypatch.chdir(tmp_path)
    assert saelab.load_sae("tiny/own").hash == saelab.load_sae(folder).hash
