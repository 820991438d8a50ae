"""The launch page's commands: what they tell hildanext parses."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hildanext.cli import build_parser
from hildanext.config import load_config

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "deploy" / "slurm.sbatch"
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "convert-wsd" in line and not line.startswith("sbatch")])
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


# Stand-ins: srun starts process 3 of 4 only, and python writes down how hildanext was called and answers as it would.
STAND_INS = {
    "srun": """[ "$1" = --kill-on-bad-exit=1 ] && shift
export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4
exec "$@"
""",
    "scontrol": """if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$*" >> "$CALLS.scontrol"; fi
""",
    "python": """if [ "$1" = -m ]; then
    echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$CALLS"
    echo "{\\"steps\\": 3, \\"finished\\": $FINISHED}"
else exec "$PYTHON" "$@"; fi
""",
}


def submit(folder: Path, finished: str, *words: str) -> tuple[list[str], list[str]]:
    """Run the Slurm script: how each process would be started, and what Slurm would be told."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text("#!/bin/bash\n" + text)
        (folder / "bin" / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CALLS": str(folder / "calls"),
        "FINISHED": finished,
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "nodes",
    }
    done = subprocess.run(["bash", str(SLURM), *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, told = folder / "calls", folder / "calls.scontrol"
    return calls.read_text().splitlines(), told.read_text().splitlines() if told.exists() else []


def test_the_slurm_script_starts_resumes_and_requeues(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"paths": {"runs": "elsewhere"}}')
    words = ["sft", "config.json", "NAME", "train.seed=3"]
    start = "3 1 4 first 24567 -m hildanext.cli sft --config config.json --run NAME --json --set train.seed=3"
    assert submit(tmp_path, "false", *words) == ([start], ["requeue 1234567"])
    (tmp_path / "elsewhere" / "NAME").mkdir(parents=True)
    (tmp_path / "elsewhere" / "NAME" / "config.json").touch()
    again = f"{start} --resume"
    assert submit(tmp_path, "true", *words) == ([start, again], ["requeue 1234567"])
    moved = f"{start} --set paths.runs=other"
    assert submit(tmp_path, "true", *words, "paths.runs=other")[0][-1] == moved
    for line in (start, again, moved):
        assert build_parser().parse_args(line.split()[7:]).run == "NAME"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("sbatch")])
def test_the_page_submits_what_is_a_training(line: str) -> None:
    script, command, config, run, *keys = shlex.split(line)[1:]
    assert ROOT / script == SLURM
    assert (command in ("convert-wsd", "sft", "dpo"), config, run) == (True, "hildanext.json", "NAME")
    load_config(None, keys)


def test_slurm_gives_the_run_time_to_save() -> None:
    text = SLURM.read_text(encoding="utf-8")
    for option in ("--signal=TERM@600", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in text
