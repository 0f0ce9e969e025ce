"""`saelab notebooks` writes the example notebooks, overwrites nothing, and says what is left to do."""

from pathlib import Path

import pytest

from saelab.cli import main, notebook_command

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"


@pytest.fixture
def said(capsys):
    """What the command prints."""

    def run(*args: str) -> list[str]:
        assert main.main(["notebooks", *args]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_all_are_written_here_and_open_beside_the_run(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    told = said()
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert there == {path.name: path.read_bytes() for path in NOTEBOOKS.glob("*.ipynb")}
    assert len(there) == 7 and told[:7] == sorted(there)
    assert told[-1].strip() == "jupyter lab" and not any("cd " in line for line in told)
    assert any("saelab demo --no-serve" in line for line in told)
    (tmp_path / "runs" / "demo" / "features").mkdir(parents=True)
    assert not any("saelab demo" in line for line in said())


def test_a_notebook_that_was_changed_is_left_alone(tmp_path, said):
    folder = tmp_path / "my notebooks"
    assert f"  cd '{folder}'" in said(str(folder))
    changed = folder / "steering.ipynb"
    changed.write_text("mine", encoding="utf-8")
    told = said(str(folder))
    assert changed.read_text(encoding="utf-8") == "mine"
    assert f"{changed} is there already and differs: left as it is" in told
    assert f"{folder / 'train_an_sae.ipynb'} is there already" in told


def test_jupyter_is_named_where_it_is_missing(tmp_path, monkeypatch, said):
    install = "  pip install 'saelab[notebook]'"
    monkeypatch.setattr(notebook_command, "find_spec", lambda name: None)
    assert install in said(str(tmp_path))
    monkeypatch.setattr(notebook_command, "find_spec", lambda name: object())
    assert install not in said(str(tmp_path))


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main.main(["notebooks", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
