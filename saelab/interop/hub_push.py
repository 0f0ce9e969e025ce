"""`push`: uploads the SAE of a RUN to the hub in one commit, with a model card and, where it can be held, SAELens' form."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError
from saelab.files import read_json
from saelab.interop import load_sae, save_sae
from saelab.interop.card import model_card
from saelab.runs import SaeRun, find_saes

FILES = ("sae.json", "sae.safetensors", "golden.safetensors")


class Pushed(NamedTuple):
    """Where the SAE is now."""

    repo: str
    commit: str
    files: tuple[str, ...]


def push(run: str | Path, repo: str, *, private: bool = False, license: str | None = None) -> Pushed:
    """Upload the SAE of RUN to the repository `repo` ("name/of-it"), which is created if needed.

    All files come in one commit: an interrupted upload leaves the repository as it was, and the same call repeated uploads what
    is missing. Raises `SaelabError` if RUN holds several SAEs, or with the hub's reason.
    """
    found = find_saes(run)
    if len(found) > 1:
        raise SaelabError(f"{run} holds {len(found)} SAEs: name one of {', '.join(str(one.sae_dir) for one in found)}.")
    with tempfile.TemporaryDirectory(prefix="saelab-push-") as name:
        folder = Path(name)
        _stage(found[0], folder, repo, license)
        files = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
        return Pushed(repo, _upload(folder, repo, private), files)


def _stage(one: SaeRun, folder: Path, repo: str, license: str | None) -> None:
    """The files of the repository in a folder."""
    sae = load_sae(one.sae_dir)
    for name in FILES:
        shutil.copyfile(one.sae_dir / name, folder / name)
    report = None
    if one.report_path.exists():
        report = read_json(one.report_path)
        shutil.copyfile(one.report_path, folder / "report.json")
    picture = next(iter(sorted((one.sae_dir.parent / "family").glob("*.svg"))), None)
    if picture is not None:
        shutil.copyfile(picture, folder / "family.svg")
    try:
        save_sae(sae, folder / "sae_lens", format="sae_lens")
        for_sae_lens = True
    except SaelabError:  # that format cannot hold it
        for_sae_lens = False
    card = model_card(
        sae, repo, report, license=license, picture="family.svg" if picture else None, for_sae_lens=for_sae_lens
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _upload(folder: Path, repo: str, private: bool) -> str:
    """The commit. Raises `SaelabError` with what went wrong and the fix."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="SAE, written by saelab")
    except errors.HFValidationError as error:
        raise SaelabError(f"{repo!r} is no repository id: use your-name/name-of-the-sae. ({error})") from error
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = (
            "log in with write access (hf auth login, or set HF_TOKEN)"
            if status in (None, 401, 403)
            else "repeat the call"
        )
        raise SaelabError(f"{repo} was not pushed ({str(error).splitlines()[0]}): {fix}.") from error
    except Exception as error:  # its network libraries have errors of their own
        raise SaelabError(
            f"{repo} was not pushed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): check the "
            "network and HF_ENDPOINT, and repeat the call, which uploads only what is missing."
        ) from error
    return str(done.oid)
