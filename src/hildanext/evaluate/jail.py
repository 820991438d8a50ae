"""A script that isolates its own process and then starts a fresh Python. Started by path; standard library only.

It enters new mount, process, network and IPC namespaces (and a user namespace unless it runs as root), builds a
read-only root that holds only the interpreter and the system's libraries, adds an empty in-memory work folder, drops
all privileges for good, and blocks system calls that open sockets, allocate uncounted memory or create namespaces. See
namespaces(7), pivot_root(2), capabilities(7), prctl(2), seccomp(2). A step that fails ends the script with an error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import select
import signal
import struct
import sys

REFUSED = 120  # exit code if this machine does not allow isolation; the reason is on stderr
NOBODY = 65534
FIRST_USER = 1 << 30  # plus the process id: a user id that no other user or run has
WORK_FOLDER = "/box"
DEVICES = ("null", "zero", "urandom")
MAX_FILES = 1000  # empty files use memory too
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPABILITY_VERSION_3 = 0x20080522
# Machine -> (its audit architecture in linux/audit.h, its column in FORBIDDEN).
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
FORBIDDEN = {
    "shmget": (29, 194),  # System V and POSIX IPC and anonymous files: memory that no process limit counts
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "socket": (41, 198),  # AF_VSOCK is not confined by network namespaces
    "io_uring_setup": (425, 425),  # can create sockets without socket()
    "unshare": (272, 97),  # in its own user namespace a process may mount anything
    "setns": (308, 268),
    "bpf": (321, 280),  # a frequent source of kernel vulnerabilities
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
}
CLONE, CLONE3 = (56, 220), (435, 435)
X32 = 0x40000000  # the x32 ABI repeats all calls from this number on
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_ANY_BIT, BPF_RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
SECCOMP_MODE_FILTER, SECCOMP_KILL, SECCOMP_ERROR, SECCOMP_ALLOW = 2, 0x80000000, 0x00050000, 0x7FFF0000
SECCOMP_NUMBER, SECCOMP_MACHINE, SECCOMP_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def call(name: str, *arguments: object) -> None:
    """Call a C library function; raises OSError unless it returns 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), None if options is None else options.encode())


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _octal(escape: re.Match[bytes]) -> bytes:
    return bytes([int(escape[1], 8)])  # mountinfo escapes a space as \040


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends. A change of credentials resets this: call it again."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)


def run_user() -> int:
    """A user id used by this run only, because process limits count per user; NOBODY if the id is not mapped."""
    user = FIRST_USER + os.getpid()
    with open("/proc/self/uid_map") as lines:
        ranges = [[int(part) for part in line.split()] for line in lines]
    return user if any(first <= user < first + n for first, _, n in ranges) else NOBODY


def enter_namespaces() -> None:
    """Enter new namespaces. Root needs no user namespace, so it also works on kernels that disable those."""
    write("/proc/self/oom_score_adj", "1000")  # killed first if memory runs out
    user, group = os.getuid(), os.getgid()
    flags = NEWNS | NEWIPC | NEWPID | NEWNET
    if user == 0:
        call("unshare", flags)
        return
    call("unshare", flags | NEWUSER)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def build_root(root: str, visible: list[str], disk_bytes: int, user: int) -> None:
    """Make `root`, an empty folder, the root: read-only `visible` paths, three devices and an empty WORK_FOLDER."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in visible:
        inside = root + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):  # /lib is a link on systems with a merged /usr
            os.symlink(os.readlink(path), inside)
        else:
            os.makedirs(inside, exist_ok=True)
            mount(path, inside, None, MS_BIND | MS_REC)
    with open("/proc/self/mountinfo", "rb") as lines:
        points = [os.fsdecode(re.sub(rb"\\(\d{3})", _octal, line.split()[4])) for line in lines]
    for point in points:
        if point.startswith(root + "/"):
            # A user namespace may not clear flags that a mount already had.
            kept = os.statvfs(point).f_flag & (MS_NODEV | MS_NOEXEC)
            mount("none", point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)
    os.mkdir(f"{root}/dev")
    for name in DEVICES:
        write(f"{root}/dev/{name}", "")
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.mkdir(root + WORK_FOLDER)
    options = f"size={disk_bytes},nr_inodes={MAX_FILES},mode=700,uid={user},gid={user}"
    mount("tmpfs", root + WORK_FOLDER, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    mount("none", root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    call("pivot_root", b".", b".")  # the old root is now mounted over the new one
    call("umount2", b".", MNT_DETACH)
    os.chdir(WORK_FOLDER)


def drop_privileges(user: int) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def forbid_calls() -> None:
    """Install a seccomp filter for this process and its children.

    FORBIDDEN calls fail with EPERM. A call of another architecture kills the process.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    name, column = MACHINES[machine]
    fails = SECCOMP_ERROR | errno.EPERM
    program = [
        (BPF_LOAD, 0, 0, SECCOMP_MACHINE),
        (BPF_EQUAL, 1, 0, name),
        (BPF_RETURN, 0, 0, SECCOMP_KILL),
        (BPF_LOAD, 0, 0, SECCOMP_NUMBER),
        (BPF_AT_LEAST, 0, 1, X32),
        (BPF_RETURN, 0, 0, SECCOMP_KILL),
        (BPF_EQUAL, 0, 1, CLONE3[column]),  # a filter cannot read its flags; libraries fall back to clone
        (BPF_RETURN, 0, 0, SECCOMP_ERROR | errno.ENOSYS),
    ]
    for numbers in FORBIDDEN.values():
        program += [(BPF_EQUAL, 0, 1, numbers[column]), (BPF_RETURN, 0, 0, fails)]
    program += [
        (BPF_EQUAL, 0, 3, CLONE[column]),
        (BPF_LOAD, 0, 0, SECCOMP_ARGUMENT),
        (BPF_ANY_BIT, 0, 1, NEWUSER),
        (BPF_RETURN, 0, 0, fails),
        (BPF_RETURN, 0, 0, SECCOMP_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def limit(limits: dict[str, int]) -> None:
    for name, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def wait_for(child: int) -> int:
    """Exit code of a child; 128 + n when signal n ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def start(spec: dict[str, object], limits: dict[str, int]) -> None:
    """Replace this process with a fresh Python whose stdout and stderr are discarded."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    limit(limits)
    os.dup2(null, 2)
    executable = str(spec["executable"])
    os.execve(executable, [executable, "-I", "-S", "-c", str(spec["driver"]), str(spec["verdict"])], {})


def main(spec: dict[str, object], limits: dict[str, int], visible: list[str]) -> int:
    """Run the code in the sandbox and return its exit code.

    Three processes: this one waits outside. Its child is process 1 of the new namespace; when it ends, the kernel ends
    every process inside. Its grandchild runs the code.
    """
    os.umask(0o022)
    user = run_user() if os.getuid() == 0 else NOBODY
    enter_namespaces()
    die_with_parent()
    if os.getppid() != spec["parent"]:  # the parent ended before die_with_parent took effect
        return REFUSED
    alive, held_open = os.pipe()
    inner = os.fork()
    if inner:
        return wait_for(inner)
    os.close(held_open)
    build_root(str(spec["root"]), visible, limits["disk_bytes"], user)
    drop_privileges(user)
    forbid_calls()
    die_with_parent()
    # Process 1 sees no parent id, so a pipe tells whether the parent ended before die_with_parent took effect.
    ended, _, _ = select.select([alive], [], [], 0)
    if ended:
        return REFUSED
    os.close(alive)
    code = os.fork()
    if code:
        return wait_for(code)
    start(spec, limits)
    return REFUSED


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        status = main(given["spec"], given["limits"], given["visible"])
    except OSError as error:
        sys.stderr.write(f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror))
        status = REFUSED
    sys.stderr.flush()
    os._exit(status)
