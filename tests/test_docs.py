"""Everything the README and the docs show is run: Python blocks whole, commands through the CLI."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffreward.algorithms import make_algorithm
from diffreward.cli import main
from diffreward.config import FinetuneConfig, SteerConfig, parse, read_prompts
from diffreward.rewards import make_reward

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# run by .ci/run, which this suite is part of
BY_CI = {
    'pip install ".[test]"',
    'pip install -e ".[test]"',
    "pip install .",
    "pytest",
    "ruff check .",
    "ruff format --check .",
    "lint-imports",
}
# a library that a benchmark compares with; nothing here needs it
NOT_RUN = {"pip install torchmetrics"}


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for n, match in enumerate(re.finditer(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            found.append(pytest.param(match[1], id=f"{page.name}-{n}"))
    return found


def commands() -> list:
    found = []
    for block in blocks("bash"):
        for line in re.sub(r"\\\n\s*", " ", block.values[0]).splitlines():
            for command in line.split("#")[0].split("&&"):
                if command.strip():
                    found.append(command.strip())
    return sorted(set(found))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Those of the repository: paths, from its top or from the package's, and links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    named = re.findall(r"`([\w-]+/[\w/.-]+\.(?:py|yaml|md|txt|jsonl|png))`", text)
    for name in named:
        if name.split("/")[0] not in ("samples", "runs", "images"):  # of a run
            assert (ROOT / name).exists() or (ROOT / "diffreward" / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_block_is_a_configuration(text, tmp_path):
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    kind = FinetuneConfig if re.search(r"^algorithm:", text, re.M) else SteerConfig
    config = parse(kind, ["--config", str(file)], "shown")
    if kind is FinetuneConfig:
        make_algorithm(config.algorithm)
    if "url" not in config.reward:  # "remote" needs a server: tests/test_serve.py
        make_reward(config.reward)


@pytest.mark.parametrize("block", blocks("console"))
def test_console_block_parses(block, monkeypatch):
    """What takes minutes or waits for ever is not run, but its options are read."""
    monkeypatch.chdir(ROOT)
    verbs = re.findall(r"^\$ (?:accelerate launch -m )?diffreward ([^#\n]*)", block, re.M)
    assert len(verbs) == len(re.findall(r"^\$ .*\bdiffreward ", block, re.M)) > 0
    for verb in verbs:
        words = shlex.split(verb)
        assert main([*words, "--print_config"]) == 0
        if words[0] == "finetune":
            config = parse(FinetuneConfig, words[1:], "shown")
            assert make_algorithm(config.algorithm) and read_prompts(config.prompts)


@pytest.mark.parametrize("command", commands())
def test_command_runs(command, tmp_path):
    if command in NOT_RUN:
        return
    if command in BY_CI:
        ci = (ROOT / ".ci" / "run").read_text()
        assert command.split()[0] in ci
        return
    words = shlex.split(command)
    if words[0] == "diffreward":
        words = [sys.executable, "-m", "diffreward", *words[1:]]
    elif words[0] == "python":
        # a script: its options are parsed, the work itself takes minutes
        words = [sys.executable, *words[1:2], "--help"]
    else:
        pytest.fail(f"{command!r} is shown, but nothing runs it")
    words = [str(ROOT / w) if (ROOT / w).is_file() else w for w in words]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
