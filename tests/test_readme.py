"""The README's code runs, its links exist, its commands install what the project declares; docs/layouts.md is true."""

import doctest
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import write_results  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def command_after(marker: str) -> str:
    found = re.search(rf"^<!-- {marker} -->\n```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no bash block after <!-- {marker} -->"
    return found.group(1)


def test_readme_has_code():
    assert len(PYTHON_BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON_BLOCKS[number], f"README.md, python block {number}", "exec"), {})


def test_the_first_block_really_is_sparse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(PYTHON_BLOCKS[0], "README.md", "exec"), names)

    model, tokens = names["model"].eval(), names["tokens"]
    assert model.config.block_sparse
    assert names["layout"].picture(1024, is_causal=True) in capsys.readouterr().out
    # One layer reads 16 sinks and 128 tokens, two layers reach twice as far: 300 earlier tokens are out of reach.
    changed = tokens.clone()
    changed[:, 400] = (changed[:, 400] + 1) % 256
    before, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
    assert before[:, 700:].equal(after[:, 700:])
    assert not before[:, 400:520].equal(after[:, 400:520])


def test_commands_use_declared_extras_and_existing_files():
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for marker in ("ci: demo", "ci: test"):
        command = command_after(marker)
        (extra,) = re.findall(r'-e "\.\[(\w+)\]"', command)
        assert extra in extras
        assert "-c constraints.txt" in command
        for path in re.findall(r"scripts/\w+\.py", command):
            assert (ROOT / path).is_file()


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_pictures_of_the_layouts_are_what_the_code_draws():
    failures, attempted = doctest.testfile(str(ROOT / "docs" / "layouts.md"), module_relative=False)
    assert attempted >= 12
    assert failures == 0


def test_the_results_are_those_of_the_records():
    assert write_results.write_readme(README) == README
    assert write_results.write_page() == write_results.PAGE.read_text(encoding="utf-8")
