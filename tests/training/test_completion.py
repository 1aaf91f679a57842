"""The completion for bash, asked as bash asks it."""

import shutil
import subprocess

import pytest

from czm_fused.training.__main__ import main

ASK = """
source "$1"; shift
function=$(complete -p czm-train | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$function
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def offered(tmp_path, capsys):
    """Return the function that gives what bash offers for the last of some words."""
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", "bash"])
    assert not stop.value.code
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def ask(*words):
        command = ["bash", "-c", ASK, "bash", str(tmp_path / "completion"), *words]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(result.stdout.split("\n")) - {""}

    return ask


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_knows_commands_and_options(offered):
    first = offered("czm-train", "")
    assert {"table1", "figures", "tune", "--lr", "--resume"} <= first
    assert all(
        word.startswith("-") and " " not in word for word in first - {"table1", "figures", "tune"}
    )
    assert offered("czm-train", "--se") == {"--seed"}
    assert offered("czm-train", "table1", "--se") == {"--seed", "--seeds"}
    assert offered("czm-train", "tune", "--tri") == {"--trials"}
    assert offered("czm-train", "figures", "--fo") == {"--folder"}
    assert offered("czm-train", "--method", "") == {"czmig", "czmi", "bn", "plain"}
