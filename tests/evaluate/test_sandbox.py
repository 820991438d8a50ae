"""Code that a model wrote runs shut in: what is right passes, what tries to get out or to cheat does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hildanext.errors import UsageError
from hildanext.evaluate import sandbox
from hildanext.evaluate.sandbox import Limits, Verdict, require_sandbox, run_check
from support.waiting import LAST_RESORT, until

QUICK = Limits(cpu_s=2, wall_s=LAST_RESORT)
CALL = "def check(f):\n    f()\n"


def refusal() -> str | None:
    if sys.platform != "linux":
        return "no namespaces on this system"
    try:
        require_sandbox()
    except UsageError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif((why := refusal()) is not None, reason=str(why))


def attempt(body: str, limits: Limits = QUICK) -> Verdict:
    """Run the body of a function, with os and sys at hand; it passes if it returns."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return run_check(f"import os, sys\ndef f():\n{lines}", CALL, "f", limits)


def test_what_is_right_passes_and_what_is_wrong_does_not() -> None:
    test = "def check(add):\n    assert add(2, 3) == 5\n    assert add(-1, 1) == 0\n"
    assert run_check("def add(a, b):\n    return a + b\n", test, "add", QUICK) == Verdict(True, "passed")
    assert run_check("def add(a, b):\n    return a - b\n", test, "add", QUICK) == Verdict(False, "AssertionError: ")
    assert not run_check("def add(a, b)\n    return a + b\n", test, "add", QUICK).passed
    assert "KeyError" in run_check("def sub(a, b):\n    return a - b\n", test, "add", QUICK).reason


def test_the_standard_library_and_its_own_folder_are_there() -> None:
    body = (
        "import collections, ctypes, decimal, hashlib, heapq, json, math, random, re, sqlite3, tempfile, threading\n"
        "assert os.listdir('.') == []\n"
        "open('note.txt', 'w').write('x')\n"
        "assert open('note.txt').read() == 'x'\n"
        "with tempfile.TemporaryFile() as file:\n"
        "    file.write(os.urandom(10))\n"
        "thread = threading.Thread(target=int)\n"
        "thread.start()\n"
        "thread.join()"
    )
    assert attempt(body) == Verdict(True, "passed")
    # Nothing is left of it for the next program.
    assert attempt("assert os.listdir('.') == []").passed


# --- faking a pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit(0)",
        "os._exit(0)",
        "raise SystemExit",
        "print('passed'); sys.stdout.flush(); os._exit(0)",
        "os.write(2, b'passed'); os._exit(0)",
        "for fd in range(3, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    ],
)
@pytest.mark.parametrize("when", ["called", "defined"])
def test_success_cannot_be_faked(body: str, when: str) -> None:
    if when == "called":
        assert not attempt(body).passed
    else:
        program = f"import os, sys\ndef f(): pass\n{body}\n"
        assert not run_check(program, CALL, "f", QUICK).passed


def test_an_open_string_does_not_swallow_the_tests() -> None:
    program = "def f():\n    return 1\n'''\n"
    test = "def check(f):\n    '''doc'''\n    assert f() == 2\n"
    assert "SyntaxError" in run_check(program, test, "f", QUICK).reason
    early = "def f():\n    return 1\ndef check(f):\n    pass\n"
    assert not run_check(early, test, "f", QUICK).passed  # the problem's own check counts


# --- getting out --------------------------------------------------------------------------------------------------


def test_no_file_of_this_machine_is_there(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    for path in (secret, Path("/etc/passwd"), Path("/proc/self/environ"), Path(__file__), Path("/tmp")):
        assert "FileNotFoundError" in attempt(f"os.stat({str(path)!r})").reason, path


@pytest.mark.parametrize(
    "folder",
    ["/", "/usr", "/usr/lib", "/dev", "/tmp", "/var/tmp", "/dev/shm", "/box/..", os.path.realpath(sys.base_prefix)],
)
def test_nothing_is_written_outside_its_folder(folder: str) -> None:
    name = f"hildanext-escape-{os.getpid()}"
    found = attempt(f"open({os.path.join(folder, name)!r}, 'w').write('x')")
    assert not found.passed
    assert any(kind in found.reason for kind in ("Read-only", "FileNotFound", "Permission")), found
    assert not os.path.exists(os.path.join(folder, name))


def test_the_environment_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HILDANEXT_SECRET", "open sesame")
    body = (
        "assert 'HILDANEXT_SECRET' not in os.environ, 'leaked'\nassert 'sesame' not in str(dict(os.environ)), 'leaked'"
    )
    assert attempt(body).passed
    # Nor by way of any process it could look at.
    look = f"assert not os.path.exists('/proc'), 'proc'\nos.kill({os.getpid()}, 0)"
    assert "ProcessLookupError" in attempt(look).reason


def test_it_is_nobody_without_privileges() -> None:
    body = "assert os.getuid() == os.getgid() == os.geteuid() >= 65534\nassert os.getgroups() in ([], [65534])\nos.setuid(0)"
    assert "PermissionError" in attempt(body).reason or "Invalid argument" in attempt(body).reason
    mount = "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/usr', b'tmpfs', 0, None) == 0"
    assert "AssertionError" in attempt(mount).reason
    remount = mount.replace("0, None", "4096 | 32, None")  # the read-only folders, writable again
    assert "AssertionError" in attempt(remount).reason
    assert "PermissionError" in attempt("os.chroot('/usr')").reason


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def without_filter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """System calls as they are: what is left is the namespaces."""
    text = Path(str(sandbox.jail.__file__)).read_text(encoding="utf-8")
    open_jail = tmp_path / "jail.py"
    open_jail.write_text(text.replace("    forbid_calls()\n    die", "    die"))
    assert open_jail.read_text() != text
    monkeypatch.setattr(sandbox.jail, "__file__", str(open_jail))


@pytest.mark.usefixtures("without_filter")
def test_no_network(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
    assert "OSError" in attempt(connect).reason
    assert "OSError" in attempt("import socket\nsocket.create_connection(('192.0.2.1', 53), timeout=1)").reason
    assert attempt("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']").passed
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.usefixtures("without_filter")
def test_no_unix_sockets_of_this_machine(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as in_folder, socket.socket(socket.AF_UNIX) as abstract:
        name = f"hildanext-{os.getpid()}"
        in_folder.bind(str(tmp_path / "s"))
        abstract.bind(f"\0{name}")
        for server, address in ((in_folder, repr(str(tmp_path / "s"))), (abstract, repr(f"\0{name}"))):
            server.listen()
            found = attempt(f"import socket\nsocket.socket(socket.AF_UNIX).connect({address})")
            assert "FileNotFoundError" in found.reason or "ConnectionRefusedError" in found.reason, found


def test_no_sockets_at_all() -> None:
    for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_VSOCK"):
        assert attempt(f"import socket\nsocket.socket(socket.{family})").reason.startswith("PermissionError"), family


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.parametrize(
    "call",
    [
        "shmget(0, 1 << 20, 0o1600)",
        "semget(0, 1, 0o1600)",
        "msgget(0, 0o1600)",
        "mq_open(b'/queue', 0o102, 0o600, None)",
        "memfd_create(b'memory', 0)",
        "unshare(0x10000000)",
    ],
)
def test_calls_that_limits_do_not_count_are_forbidden(call: str) -> None:
    """System V memory that nobody is attached to counts towards no process; a user namespace may mount more memory."""
    assert attempt(f"{LIBC}raise ValueError((libc.{call}, ctypes.get_errno()))").reason == "ValueError: (-1, 1)"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
def test_no_way_round_the_filter() -> None:
    new_user = f"{LIBC}raise ValueError((libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), ctypes.get_errno()))"
    assert attempt(new_user).reason == "ValueError: (-1, 1)"  # clone
    assert "(-1, 38)" in attempt(new_user.replace("syscall(56, ", "syscall(435, ")).reason  # clone3: there is none
    assert "SIGSYS" in attempt(f"{LIBC}libc.syscall(0x40000000 | 41, 1, 1, 0)").reason  # socket, by its x32 number


def test_empty_files_are_counted() -> None:
    assert "No space left" in attempt("for i in range(2000):\n    open(f'{i}', 'w')").reason


def test_an_exit_code_is_nothing_but_a_failure() -> None:
    """120 is the jail's own, from 129 on they stand for signals where there is one."""
    reasons = [attempt(f"os._exit({code})").reason for code in (0, 120, 129, 200, 255)]
    ended = ("exit code 0", "exit code 120", "signal SIGHUP", "exit code 200", "exit code 255")
    assert reasons == [f"ended by {how} before the tests finished" for how in ended]


# --- taking too much ------------------------------------------------------------------------------------------------


def test_an_endless_loop_ends() -> None:
    found = attempt("while True: pass", Limits(cpu_s=1, wall_s=LAST_RESORT))
    assert "SIGKILL" in found.reason or "SIGXCPU" in found.reason


def test_sleeping_ends_by_the_clock_on_the_wall() -> None:
    assert attempt("import time; time.sleep(1000)", Limits(wall_s=1.5)).reason == "not finished after 1.5 s"


def test_a_fork_bomb_runs_into_the_limit() -> None:
    body = "try:\n    while True:\n        if os.fork() == 0:\n            continue\nexcept BlockingIOError:\n    os._exit(1)"
    assert not attempt(body, Limits(cpu_s=1, wall_s=LAST_RESORT)).passed
    count = (
        "import time\nchildren = []\n"
        "try:\n    while True:\n        child = os.fork()\n        if child == 0:\n            time.sleep(60)\n        children.append(child)\n"
        "except BlockingIOError:\n    pass\n"
        "raise ValueError(f'{len(children)} children')"
    )
    reason = attempt(count).reason
    assert int(reason.split()[1]) < QUICK.processes


def test_programs_side_by_side_have_limits_of_their_own() -> None:
    """Process limits count per user: all of them as one user would take each other's places."""
    if os.getuid() != 0:
        pytest.skip("an ordinary user's namespace has a count of its own")
    child = "if os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\n"
    body = f"import time\n{child}time.sleep(1)\n{child}"
    with ThreadPoolExecutor(4) as pool:
        assert [found.reason for found in pool.map(attempt, [body] * 4)] == ["passed"] * 4


def test_what_a_program_may_take_of_the_machine() -> None:
    limits = Limits()
    assert limits.processes * limits.memory_bytes <= 2 << 30


def test_huge_allocations_and_files_fail() -> None:
    assert "MemoryError" in attempt("x = bytearray(2 << 30)").reason
    assert (
        "MemoryError" in attempt("import mmap; mmap.mmap(-1, 2 << 30)").reason
        or "OSError" in attempt("import mmap; mmap.mmap(-1, 2 << 30)").reason
    )
    assert "File too large" in attempt("open('big', 'wb').write(bytes(8 << 20))").reason
    many = "for i in range(100):\n    open(f'{i}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in attempt(many).reason
    assert "Too many open files" in attempt("files = [open('/dev/null') for _ in range(100)]").reason


def test_huge_output_goes_nowhere() -> None:
    assert attempt("for _ in range(1000):\n    print('x' * 100_000)\n    os.write(2, b'x' * 100_000)").passed
    flood = "data = b'x' * 100_000\nfor fd in range(3, 1000):\n    try: os.write(fd, data)\n    except OSError: pass"
    assert not attempt(flood, Limits(cpu_s=2, wall_s=3)).passed


def test_deep_recursion_is_an_error_not_a_crash_of_ours() -> None:
    assert "RecursionError" in attempt("g = lambda: g()\ng()").reason
    deep = "sys.setrecursionlimit(10**7)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    assert not attempt(deep).passed


def test_a_daemon_does_not_survive() -> None:
    """Double fork and setsid, and it has started."""
    marker = f"hildanext-daemon-{os.getpid()}"
    daemon = (
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        '        code = \'import time; open("up", "w"); time.sleep(300)\'\n'
        f"        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', code, '{marker}'])\n"
        "    os._exit(0)\n"
        "while not os.path.exists('up'):\n    pass"
    )
    assert attempt(daemon).passed
    alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(path)]
    assert alive == []


def test_nothing_outlives_an_evaluation_that_is_killed() -> None:
    """kill -9 leaves no time to tidy up: the kernel ends what runs."""
    marker = f"hildanext-orphan-{os.getpid()}"
    code = "import time; time.sleep(300)"
    body = f"import os, sys\ndef f():\n    os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', {code!r}, {marker!r}])\n"
    script = (
        "from hildanext.evaluate.sandbox import Limits, run_check\n"
        f"run_check({body!r}, {CALL!r}, 'f', Limits(cpu_s=300, wall_s=300))\n"
    )
    environment = {"PYTHONPATH": str(Path(sandbox.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as evaluation:
        until(lambda: _running(marker))
        evaluation.kill()
    until(lambda: not _running(marker))


def _running(marker: str) -> bool:
    """Whether a program that was started with the marker runs. The evaluation itself has it inside a longer argument."""
    wanted = b"\0" + marker.encode() + b"\0"
    return any(_read(path).endswith(wanted) for path in Path("/proc").glob("[0-9]*/cmdline"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_nothing_is_left_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert attempt("open('x', 'w').write('x')").passed
    assert list(tmp_path.iterdir()) == []


# --- where it cannot be done --------------------------------------------------------------------------------------


def test_without_namespaces_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel that says no, as in most containers: one clear line, and the code has not run."""
    broken = tmp_path / "jail.py"
    text = Path(str(sandbox.jail.__file__)).read_text(encoding="utf-8")
    broken.write_text(text.replace("0x00020000, 0x08000000", "0x1, 0x08000000"))
    monkeypatch.setattr(sandbox.jail, "__file__", str(broken))
    with pytest.raises(UsageError, match="cannot be isolated on this machine") as caught:
        require_sandbox()
    assert "\n" not in str(caught.value)


def test_a_machine_without_a_list_of_calls_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "jail.py"
    text = Path(str(sandbox.jail.__file__)).read_text(encoding="utf-8")
    other.write_text(text.replace("os.uname().machine", "'riscv64'"))
    monkeypatch.setattr(sandbox.jail, "__file__", str(other))
    with pytest.raises(UsageError, match="no list of system calls for riscv64"):
        require_sandbox()


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="Linux only"):
        require_sandbox()


def test_an_ordinary_user_is_shut_in_too() -> None:
    """The other way in: a user namespace. Needs a Python that another user may start."""
    if os.getuid() != 0:
        pytest.skip("this user is an ordinary one: every test here was of that way")
    python = "/usr/bin/python3"
    source = Path(sandbox.__file__).parents[2]
    script = (
        f"import sys; sys.path.insert(0, {str(source)!r})\n"
        "from hildanext.evaluate.sandbox import run_check\n"
        f"print(run_check('import os', {CALL!r}.replace('f()', 'assert f(1) == 1'), 'f'))\n"
        "good = 'import os\\ndef f(): assert os.getuid() == 65534; assert not os.path.exists(\"/home\")\\n'\n"
        f"print(run_check(good, {CALL!r}, 'f'))\n"
        'bad = \'def f(): open("/usr/x", "w")\\n\'\n'
        f"print(run_check(bad, {CALL!r}, 'f'))\n"
    )
    try:
        answer = subprocess.run(
            [python, "-c", script],
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            env={},
        )
    except OSError as error:
        pytest.skip(f"no Python for another user: {error}")
    if "ModuleNotFoundError" in answer.stderr or "PermissionError" in answer.stderr:
        pytest.skip("the sources cannot be read by another user")
    if "cannot be isolated" in answer.stderr:
        pytest.skip("this kernel gives ordinary users no namespaces")
    lines = answer.stdout.splitlines()
    assert "KeyError" in lines[0], answer.stderr
    assert "passed=True" in lines[1]
    assert "Read-only" in lines[2]
