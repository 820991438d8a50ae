"""The launch page's commands: what they tell hildanext parses."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hildanext.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "convert-wsd" in line])
def test_what_the_page_tells_hildanext_parses(line):
    words = shlex.split(line)
    args = build_parser().parse_args(words[words.index("convert-wsd") :])
    assert (args.command, args.config, args.run) == ("convert-wsd", "hildanext.json", "NAME")


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("torchrun")])
def test_torchrun_takes_its_own_options_and_no_other(line):
    from torch.distributed.run import get_args_parser

    words = shlex.split(line)
    own = get_args_parser().parse_args(words[1:])
    assert own.module
    assert own.training_script_args[0] == "convert-wsd" or own.training_script == "hildanext.cli"
    assert "--run" in own.training_script_args


def test_the_slurm_script_is_bash_and_starts_what_the_page_says():
    script = ROOT / "deploy" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert "-m -- hildanext.cli convert-wsd --config" in text
    assert "--signal=TERM@120" in text
