"""Shell completion, and that it waits for nothing it does not need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import clean_environment
from tests.support.verbs import run_verb

AS_SCRIPT = "import sys; sys.argv[0] = 'billing-tailer'; from billing_tailer.cli import main; main()"
WHAT_WAS_LOADED = """
import atexit, sys
atexit.register(lambda: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr))
"""
SOURCE = "_BILLING_TAILER_COMPLETE"


def completed(words: str) -> tuple[list[str], set[str]]:
    """What bash is offered behind these words, and which packages were loaded for it. Neither database nor
    configuration is there: the one variable that is set is wrong."""
    variables = {
        "BILLING_TAILER_NO_SUCH": "x",
        SOURCE: "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    found = run_verb(variables, script=WHAT_WAS_LOADED + AS_SCRIPT)
    assert found.returncode == 0, found.stderr
    return found.stdout.split(), set(found.stderr.split())


def test_verbs_are_completed_without_loading_them() -> None:
    offered, loaded = completed("billing-tailer off")
    assert offered == ["offsets"]
    assert loaded.isdisjoint({"psycopg", "httpx", "rich", "uvicorn", "structlog"})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("billing-tailer offsets re", {"reset"}),
        ("billing-tailer offsets reset --r", {"--reason"}),
        ("billing-tailer exceptions list --kind over", {"overdue"}),
    ],
)
def test_the_rest_is_completed(words: str, expected: set[str]) -> None:
    offered, loaded = completed(words)
    assert set(offered) == expected
    assert loaded.isdisjoint({"uvicorn", "starlette"})


def test_a_verb_loads_what_it_needs() -> None:
    found = run_verb({}, "version", script=WHAT_WAS_LOADED + AS_SCRIPT)
    assert set(found.stderr.split()).isdisjoint({"psycopg", "httpx", "rich"})
    found = run_verb({}, script=WHAT_WAS_LOADED + "import billing_tailer.state_cli")
    assert set(found.stderr.split()).isdisjoint({"uvicorn", "starlette"})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(shell: str) -> None:
    found = run_verb({SOURCE: f"source_{shell}"}, script=AS_SCRIPT)
    assert (found.returncode, found.stderr) == (0, "")
    assert "billing-tailer" in found.stdout
    assert f"complete_{shell}" in found.stdout


def test_in_a_real_bash(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed: there is nothing to complete words in")
    script = tmp_path / "billing-tailer"
    script.write_text(f"#!{sys.executable}\nfrom billing_tailer.cli import main\nmain()\n")
    script.chmod(0o755)
    program = (
        f'eval "$({SOURCE}=source_bash billing-tailer)"; complete -p billing-tailer >&2; '
        "COMP_WORDS=(billing-tailer dead-letters re); COMP_CWORD=2; "
        "_billing_tailer_completion billing-tailer; echo ${COMPREPLY[@]}"
    )
    environment = clean_environment({})
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    found = subprocess.run([bash, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "retry\n"), found.stderr
    assert "_billing_tailer_completion billing-tailer" in found.stderr


def test_it_can_be_installed(tmp_path: Path) -> None:
    """For the shell of whoever asks, into their own files."""
    found = run_verb(
        {"HOME": str(tmp_path), "SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        "--install-completion",
        "bash",
        script=AS_SCRIPT,
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / ".bash_completions/billing-tailer.sh").exists()
