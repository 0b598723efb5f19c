"""The child's side of the sandbox: locks itself in, then forks two processes for each program and watches them.

Started by its path in a bare interpreter (`python -S`). It imports little, since every response pays for its start.
The program's process (`sandbox_program`) runs the program, the judging process (`sandbox_judge`) the tests; this one
keeps their limits and kills them. Tests and verdicts go between the judging process and our parent directly: nothing
of them is ever in the memory that a program's process is a copy of.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` itself imports enum and re, a third of the start
import _socket  # `socket` itself imports selectors and enum
import ctypes
import fcntl
import marshal
import os
import resource
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from prefixloss.detect.code import sandbox_judge, sandbox_program, sandbox_wire
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # for these three, and no longer
    import sandbox_judge
    import sandbox_program
    import sandbox_wire

    del sys.path[0]

WORK = "/work"  # a program's directory, inside the private root
JUDGE_LATER = 0.25  # seconds that the judging process has when the program's are over
GONE = 3  # its exit status where the program has ended before the tests
LIBRARIES = (
    f"{sys.base_prefix}/lib /lib /lib64 /usr/lib /usr/lib64 /nix/store /etc/ld.so.cache /usr/share/zoneinfo".split()
)

Cell = tuple[str, str]  # file name, source


class Limits:
    """What one program may take: seconds, bytes, numbers."""

    def __init__(
        self,
        cpu_seconds: float,
        wall_seconds: float,
        memory_bytes: int,
        disk_bytes: int,
        output_bytes: int,
        open_files: int,
        threads: int,
    ) -> None:
        self.cpu_seconds = cpu_seconds
        self.wall_seconds = wall_seconds
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self.output_bytes = output_bytes
        self.open_files = open_files
        self.threads = threads


# ---- system calls ------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_ARM = os.uname().machine == "aarch64"
_KNOWN_MACHINE = sys.platform == "linux" and sys.maxsize > 2**32 and os.uname().machine in ("x86_64", "aarch64")

# all a program may call: name:number on x86_64:number on aarch64
_ALLOWED = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 lseek:8:62
open:2:- openat:257:56 openat2:437:437 creat:85:- close:3:57 close_range:436:436 dup:32:23 dup2:33:- dup3:292:24
pipe:22:- pipe2:293:59 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78 getcwd:79:17 chdir:80:49 fchdir:81:50
getdents:78:- getdents64:217:61 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 truncate:76:45 ftruncate:77:46
fallocate:285:47 umask:95:166 fsync:74:82 fdatasync:75:83 sync_file_range:277:84 flock:73:32 fadvise64:221:223
sendfile:40:71 copy_file_range:326:285 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11
llistxattr:195:12 flistxattr:196:13 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 msync:26:227
mincore:27:232 brk:12:214 poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20
epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd:284:- eventfd2:290:19 rt_sigaction:13:134
rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137
sigaltstack:131:132 pause:34:- alarm:37:- setitimer:38:103 getitimer:36:102 nanosleep:35:101 clock_nanosleep:230:115
clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165
sysinfo:99:179 uname:63:160 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156
getpriority:140:141 getrlimit:97:163 getcpu:309:168 sched_yield:24:124 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 getrandom:318:278 futex:202:98 set_tid_address:218:96
set_robust_list:273:99 rseq:334:293 arch_prctl:158:- membarrier:324:283 restart_syscall:219:128 exit:60:93
exit_group:231:94 wait4:61:260 waitid:247:95
"""
# in a private root only: landlock does not keep a program from these
_ALLOWED_ON_OWN_FILES = """
chmod:90:- fchmod:91:52 fchmodat:268:53 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:-
"""
_CLONE, _CLONE3, _KILL, _TGKILL = (220, 435, 129, 131) if _ARM else (56, 435, 62, 234)
_FCNTL, _IOCTL, _PRLIMIT = (25, 29, 261) if _ARM else (72, 16, 302)
_SECCOMP, _SENDMSG = (277, 211) if _ARM else (317, 46)
_READ, _READV = (63, 65) if _ARM else (0, 19)
_UNNOTED = (29, 167) if _ARM else (16, 157)  # ioctl, prctl: libraries ask, and do without
_CAPSET, _PIVOT_ROOT = (91, 41) if _ARM else (126, 155)
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_ENTER = 442, 444, 445, 446

_CLONE_THREAD = 0x10000
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032)  # not F_SETOWN, F_SETSIG: they send signals to others
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _syscall(number: int, *args: object) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *args), f"system call {number}")


def _prctl(option: int, value: int, pointer: object = None) -> int:
    zero = ctypes.c_ulong(0)
    return _checked(_libc.prctl(option, ctypes.c_ulong(value), pointer, zero, zero), f"prctl {option}")


# ---- seccomp -----------------------------------------------------------------------------------------------

_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO, _TELL = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_EPERM, _ENOSYS = 1, 38


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _op(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction of a filter."""
    return code.to_bytes(2, "little") + bytes([then, otherwise]) + value.to_bytes(4, "little")


def _filter(pid: int, allowed: str, refuse: int) -> bytes:
    """The system-call filter of process `pid`: threads but no processes, no sockets, no signal to anyone else.

    refuse: what becomes of all else, an error or a word to the watching process, which also answers reads of file 0.
    """

    def only_if(number: int, argument: int, values: tuple[int, ...], test: int = _JUMP_IF_EQUAL) -> bytes:
        """Allowed where the lower half of an argument is one of the values (or has one of their bits)."""
        body = _op(_LOAD, 16 + 8 * argument)
        body += b"".join(_op(test, v, 0, 1) + _op(_RETURN, _ALLOW) for v in values) + _op(_RETURN, refuse)
        return _op(_JUMP_IF_EQUAL, number, 0, len(body) // 8) + body

    def not_of_input(number: int) -> bytes:
        body = _op(_LOAD, 16) + _op(_JUMP_IF_EQUAL, 0, 0, 1) + _op(_RETURN, refuse) + _op(_RETURN, _ALLOW)
        return _op(_JUMP_IF_EQUAL, number, 0, len(body) // 8) + body

    told = refuse == _TELL
    numbers = (entry.split(":")[2 if _ARM else 1] for entry in allowed.split())
    return (
        _op(_LOAD, 4)
        + _op(_JUMP_IF_EQUAL, 0xC00000B7 if _ARM else 0xC000003E, 1, 0)
        + _op(_RETURN, _KILL_PROCESS)  # another architecture's numbers
        + _op(_LOAD, 0)
        + (not_of_input(_READ) + not_of_input(_READV) if told else b"")
        + (b"".join(_op(_JUMP_IF_EQUAL, n, 0, 1) + _op(_RETURN, _ALLOW) for n in (_SECCOMP, _SENDMSG)) if told else b"")
        + b"".join(_op(_JUMP_IF_EQUAL, int(n), 0, 1) + _op(_RETURN, _ALLOW) for n in numbers if n != "-")
        + _op(_JUMP_IF_EQUAL, _CLONE3, 0, 1)
        + _op(_RETURN, _ERRNO | _ENOSYS)  # its flags are out of a filter's sight; the C library falls back to clone
        + only_if(_CLONE, 0, (_CLONE_THREAD,), _JUMP_IF_ANY_BIT)
        + only_if(_KILL, 0, (pid,))
        + only_if(_TGKILL, 0, (pid,))
        + only_if(_FCNTL, 1, _FCNTL_COMMANDS)
        + only_if(_IOCTL, 1, _IOCTL_COMMANDS)
        + only_if(_PRLIMIT, 0, (0,))
        + _op(_RETURN, refuse)
    )


def _has_seccomp() -> bool:
    return _KNOWN_MACHINE and _libc.prctl(21, 0, 0, 0, 0) >= 0  # PR_GET_SECCOMP


def _enter_seccomp(private_root: bool, watcher: _socket.socket | None) -> None:
    """watcher: gets the descriptor from which refused calls can be read, where the kernel has one (5.0 on)."""
    allowed = _ALLOWED + (_ALLOWED_ON_OWN_FILES if private_root else "")
    if watcher is not None:
        code = _filter(os.getpid(), allowed, _TELL)
        program = _Filter(len(code) // 8, code)
        told = _libc.syscall(ctypes.c_long(_SECCOMP), 1, 8, ctypes.byref(program))  # SET_MODE_FILTER, NEW_LISTENER
        if told >= 0:
            watcher.sendmsg([b"y"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, told.to_bytes(4, "little"))])
            os.close(told)
            code = _without((_SECCOMP, _SENDMSG))
            program = _Filter(len(code) // 8, code)
            _checked(_libc.syscall(ctypes.c_long(_SECCOMP), 1, 0, ctypes.byref(program)), "seccomp")
            return
    code = _filter(os.getpid(), allowed, _ERRNO | _EPERM)
    _prctl(22, 2, ctypes.byref(_Filter(len(code) // 8, code)))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _without(numbers: tuple[int, ...]) -> bytes:
    """A further filter, against the calls that setting up the first one took."""
    refuse = _op(_RETURN, _ERRNO | _EPERM)
    return _op(_LOAD, 0) + b"".join(_op(_JUMP_IF_EQUAL, n, 0, 1) + refuse for n in numbers) + _op(_RETURN, _ALLOW)


class Refusals:
    """The calls that the kernel refuses the program, told by the kernel itself. listener: -1 where it does not tell."""

    def __init__(self, watcher: _socket.socket) -> None:
        self.seen: set[str] = set()
        self.listener = -1
        _, ancillary, _, _ = watcher.recvmsg(1, _socket.CMSG_SPACE(4))  # nothing, where the program's process ended
        for _, _, data in ancillary:
            self.listener = int.from_bytes(data[:4], "little")

    def answer(self) -> None:
        """The next one: no permission, or the end of the input."""
        notice = bytearray(80)  # struct seccomp_notif: id, pid, flags, number, architecture, pointer, arguments
        try:
            fcntl.ioctl(self.listener, 0xC0502100, notice)  # SECCOMP_IOCTL_NOTIF_RECV
            number = int.from_bytes(notice[16:20], "little")
            is_read = number in (_READ, _READV)
            if number not in _UNNOTED:
                self.seen.add("input" if is_read else f"{number}")
            error = 0 if is_read else -_EPERM
            reply = notice[:8] + bytes(8) + error.to_bytes(4, "little", signed=True) + bytes(4)
            fcntl.ioctl(self.listener, 0xC0182101, reply)  # SECCOMP_IOCTL_NOTIF_SEND
        except OSError:
            return  # the thread that asked has ended, or was interrupted

    def close(self) -> str:
        """What was refused, in words; "-" where nobody knows."""
        if self.listener < 0:
            return "-"
        os.close(self.listener)
        return " ".join(sorted(self.seen))


# ---- landlock ----------------------------------------------------------------------------------------------

_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("directory", ctypes.c_int32)]


def _landlock_version() -> int:
    """0 where there is none, or one that cannot keep a program from truncating a file (before 3)."""
    version = _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1) if _KNOWN_MACHINE else 0
    return version if version >= 3 else 0


def _enter_landlock(version: int, readable: list[str], writable: list[str]) -> None:
    """Files: these paths and no others. From version 4 on no TCP, from 6 on no signal to others, no abstract socket."""
    rights = (1 << (16 if version >= 5 else 15)) - 1
    settings = (ctypes.c_uint64 * 3)(rights, 3, 3)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall(_LANDLOCK_CREATE, ctypes.byref(settings), ctypes.c_size_t(size), 0)
    for path, wanted in [(p, _READ_FILE | _READ_DIR) for p in readable] + [(p, rights) for p in writable]:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        of_a_file = _READ_FILE | _WRITE_FILE  # what may be asked for where the path is no directory
        rule = _PathBeneath(wanted if os.path.isdir(path) else wanted & of_a_file, file)
        _syscall(_LANDLOCK_ADD, rules, 1, ctypes.byref(rule), 0)
        os.close(file)
    _syscall(_LANDLOCK_ENTER, rules, 0)
    os.close(rules)


# ---- namespaces and user -----------------------------------------------------------------------------------

_NEW_USER = 0x10000000
_NAMESPACES = 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # mount, pid, net, ipc, uts


def _enter_namespaces() -> str:
    """Own mounts, processes (none but ours), network (none), ipc: a child is in them all. Empty where not allowed,
    "new user" where it took a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _libc.unshare(_NAMESPACES) == 0:
        return "same user"
    if _libc.unshare(_NEW_USER | _NAMESPACES) != 0:
        return ""
    try:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as out:
                out.write(text)
    except OSError:
        pass  # some systems let us in without a name: then the mounts will be refused
    return "new user"


def _exposed() -> list[str]:
    """The paths a Python program needs to read, no path inside another."""
    paths = sorted({p for p in (*sys.path, *LIBRARIES) if os.path.isabs(p) and os.path.exists(p)})
    return [p for p in paths if not any(p.startswith(f"{other}/") for other in paths)]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    kind_bytes = kind.encode() if kind else None
    arguments = (source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode())
    _checked(_libc.mount(*arguments), f"mount {target}")


def _make_read_only(path: str, flags: int, recursive: bool = True) -> None:
    attributes = (ctypes.c_uint64 * 4)(flags | 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID
    at = 0x8000 if recursive else 0  # AT_RECURSIVE
    _syscall(_MOUNT_SETATTR, -100, path.encode(), at, ctypes.byref(attributes), ctypes.c_size_t(32))


def _enter_private_root() -> None:
    """A root in memory that holds Python's and the system's libraries, /dev/null and `WORK`, all read-only."""
    root = "/proc"  # any directory that holds nothing we need
    _mount("none", "/", None, 0x4000 | 0x40000)  # MS_REC | MS_PRIVATE
    _mount("tmpfs", root, "tmpfs", 2 | 4, "size=1m,mode=755")  # MS_NOSUID | MS_NODEV
    for path in [*_exposed(), "/dev/null"]:
        os.makedirs(root + os.path.dirname(path), exist_ok=True)
        if os.path.islink(path) and os.path.dirname(path) == "/":
            os.symlink(os.readlink(path), root + path)  # /lib -> usr/lib
            continue
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        _mount(path, root + path, None, 0x1000 | 0x4000)  # MS_BIND | MS_REC
        _make_read_only(root + path, 0 if path == "/dev/null" else 4)  # MOUNT_ATTR_NODEV
    os.mkdir(root + WORK)
    os.chdir(root)
    _syscall(_PIVOT_ROOT, b".", b".")
    _checked(_libc.umount2(b".", 2), "umount")  # MNT_DETACH: the old root
    os.chdir("/")
    _make_read_only("/", 4, recursive=False)


def _enter_work(disk_bytes: int, user: int) -> None:
    """An empty directory in memory, gone with this process."""
    _checked(_libc.unshare(0x20000), "unshare")  # CLONE_NEWNS
    owner = f",uid={user},gid={user}" if user else ""
    _mount("tmpfs", WORK, "tmpfs", 2 | 4, f"size={disk_bytes},nr_inodes=1024,mode=700{owner}")
    os.chdir(WORK)


def _may_become(user: int) -> bool:
    """Whether we are root, and not one that has to stay it."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/status") as status, open("/proc/self/uid_map") as users, open("/proc/self/gid_map") as groups:
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
        ranges = [[tuple(map(int, line.split())) for line in file] for file in (users, groups)]
    mapped = all(any(first <= user < first + count for first, _, count in known) for known in ranges)
    return capabilities >> 6 & 3 == 3 and mapped  # CAP_SETGID, CAP_SETUID


def _readable_by_all(path: str) -> bool:
    if not os.path.isdir(path):
        path = os.path.dirname(path)
    while path != "/":
        if os.stat(path).st_mode & 0o005 != 0o005:
            return False
        path = os.path.dirname(path)
    return True


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _drop_capabilities() -> None:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _syscall(_CAPSET, ctypes.byref(header), ctypes.byref(none))


def _die_with_parent() -> None:
    _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


class Protections:
    """active: the names of those that are, or in each fork will be, active. user: whom the forks become (0: nobody
    else). own_count: whether all processes and threads of that user are ours."""

    def __init__(self) -> None:
        self.active = ["limits"]
        self.user = 0
        self.own_count = False


def lock_in() -> Protections:
    """What one process can do for all its forks."""
    got = Protections()
    if not _KNOWN_MACHINE:
        return got
    free_user = 2**30 + 2 * os.getpid()  # nobody else on the machine; the next one is the judging process's
    may_become = _may_become(free_user) and _may_become(free_user + 1)
    namespaces = _enter_namespaces()
    if namespaces:
        got.active.append("namespaces")
        if child := os.fork():  # the child is the first process of its namespace: when it ends, all end
            os.waitpid(child, 0)
            os._exit(0)
        try:
            _enter_private_root()
            got.active.append("private-root")
        except OSError:
            os.chdir("/")
    if may_become and namespaces != "new user" and all(_readable_by_all(p) for p in _exposed()):
        got.active.append("own-user")
        got.user = free_user
    got.own_count = got.user != 0 or namespaces == "new user"
    got.active += [name for name, has in (("landlock", _landlock_version()), ("seccomp", _has_seccomp())) if has]
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    _prctl(4, 0)  # PR_SET_DUMPABLE: no other process may look inside
    _die_with_parent()
    return got


# ---- one program -------------------------------------------------------------------------------------------


def _set_limits(limits: Limits, own_count: bool, later: float) -> None:
    cpu = int(limits.cpu_seconds) + 2  # the timers come first
    bounds = {
        "CPU": cpu,
        "AS": limits.memory_bytes,
        "FSIZE": limits.disk_bytes,
        "NOFILE": limits.open_files,
        "CORE": 0,
        "MEMLOCK": 0,
        "STACK": 8 << 20,
    }
    if own_count:  # elsewhere the count would include processes that are not ours
        bounds["NPROC"] = limits.threads
    for name, value in bounds.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            least = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (least, least))

    def stop(*_: object) -> None:
        raise sandbox_program.OutOfTime

    for which, alarm, seconds in (("PROF", "PROF", limits.cpu_seconds), ("REAL", "ALRM", limits.wall_seconds + later)):
        signal.signal(getattr(signal, f"SIG{alarm}"), stop)
        signal.setitimer(getattr(signal, f"ITIMER_{which}"), seconds, 0.1)  # again and again, against a bare except


# ---- the programs, one after another -----------------------------------------------------------------------


def _confine(limits: Limits, protections: Protections, files: list[int], judge: bool) -> None:
    """Locks this fork in. files: its descriptors from 1 on, the last of a program's being a socket to the process that
    watches it. If a protection fails, it ends."""
    private_root = "private-root" in protections.active
    try:
        os.setsid()
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, 64) for file in files]
        for number, file in enumerate(high, 1):
            os.dup2(file, number)
        os.closerange(len(files) + 1, 1 << 20)
        if private_root and not judge:
            _enter_work(limits.disk_bytes, protections.user)
        if protections.user:
            _become(protections.user + judge)
        if _KNOWN_MACHINE:
            _drop_capabilities()
            _die_with_parent()
        os.environ.clear()
        os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
        _set_limits(limits, protections.own_count, JUDGE_LATER if judge else 0.0)
        if "landlock" in protections.active:
            writable = ["/dev/null", *([WORK] if private_root and not judge else [])]
            _enter_landlock(_landlock_version(), _exposed(), writable)
        watcher = None if judge else _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, len(files))
        if "seccomp" in protections.active:
            _enter_seccomp(private_root and not judge, watcher)
        if watcher is not None:
            os.close(watcher.detach())
    except BaseException:
        os._exit(1)  # without a word to the other


def _be_judge(count: int, limits: Limits, protections: Protections, tests: int, files: list[int]) -> None:
    """files: from the program, to it, verdicts, and the end of a pipe that tells how long this process lives."""
    asked = sandbox_wire.Channel(tests, -1).receive()
    null = os.open("/dev/null", os.O_WRONLY)
    _confine(limits, protections, [null, null, *files], judge=True)
    program = sandbox_wire.Channel(3, 4) if count else None
    try:
        there = sandbox_judge.run(
            count, [sandbox_judge.Check(*test) for test in asked[1]], program, sandbox_wire.Channel(-1, 5)
        )
    except sandbox_wire.GoneError:
        there = False
    os._exit(0 if there else GONE)


def _watch(  # noqa: PLR0912  # one branch an event
    program: int, judge: int, output: int, life: int, requests: int, refusals: Refusals | None, limits: Limits
) -> tuple[str, int, bytes]:
    """Reads what the program writes, and answers the calls that it is refused, until the judging process ends. Why the
    program was ended (else empty), its exit status (-n: signal n), its output. program: 0 where there is none."""
    got = b""
    deadline = time.monotonic() + limits.wall_seconds + 2 * JUDGE_LATER  # their own timers come first
    poll = select.poll()
    for pipe in (output, life):
        poll.register(pipe, select.POLLIN)
    if refusals is not None and refusals.listener >= 0:
        poll.register(refusals.listener, select.POLLIN)
    poll.register(requests, 0)  # only its end: nobody waits for the result any more
    why, judging = "", True
    while judging:
        for pipe, event in poll.poll(50):
            if refusals is not None and pipe == refusals.listener:
                if event & select.POLLIN:
                    refusals.answer()
                else:
                    poll.unregister(pipe)
                continue
            data = os.read(pipe, 1 << 16) if pipe == output else b""
            got += data
            if pipe == life:
                judging = False
            elif not data:
                poll.unregister(pipe)
                why = "given up" if pipe == requests else why
        if len(got) > limits.output_bytes:
            why, got = "wrote too much", got[: limits.output_bytes]
        late = time.monotonic() - deadline
        if late > 0:
            why = why or "out of time"
        if why and program:
            os.kill(program, signal.SIGKILL)
        if late > 4 * JUDGE_LATER or why == "given up":
            os.kill(judge, signal.SIGKILL)
    status = _ended(program, os.waitstatus_to_exitcode(os.waitpid(judge, 0)[1]) == GONE) if program else 0
    while select.select([output], [], [], 0)[0] and (data := os.read(output, 1 << 16)):
        got += data
        if len(got) > limits.output_bytes:
            break
    return why, status, got[: limits.output_bytes]


def _ended(program: int, by_itself: bool) -> int:
    """Ends the program's process; one that is ending by itself may do so first. Its exit status."""
    until = time.monotonic() + 0.5
    ended, status = 0, 0
    while by_itself and not ended and time.monotonic() < until:
        ended, status = os.waitpid(program, os.WNOHANG)
        time.sleep(0 if ended else 0.002)
    if not ended:
        os.kill(program, signal.SIGKILL)
        _, status = os.waitpid(program, 0)
    try:  # noqa: SIM105  # contextlib takes long to import
        os.killpg(program, signal.SIGKILL)  # what it left behind, where it could start processes at all
    except OSError:
        pass
    return os.waitstatus_to_exitcode(status)


def _read(pipe: int, count: int) -> bytes:
    """So many bytes, fewer only at the pipe's end."""
    data = b""
    while len(data) < count and (more := os.read(pipe, count - len(data))):
        data += more
    return data


def _write(pipe: int, data: bytes) -> None:
    data = len(data).to_bytes(4, "little") + data
    while data:
        data = data[os.write(pipe, data) :]


def _fork(child: Callable[[], None]) -> int:
    """A process that is `child` and nothing after it."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    return pid


def serve(requests: int, replies: int, tests: int, verdicts: int, protections: Protections) -> None:
    """One program a request, until the parent closes the pipe."""
    while head := _read(requests, 4):
        cells, numbers = marshal.loads(_read(requests, int.from_bytes(head, "little")))
        _write(replies, _judged(cells, Limits(*numbers), protections, requests, tests, verdicts))


def _judged(
    cells: list[Cell], limits: Limits, protections: Protections, requests: int, tests: int, verdicts: int
) -> bytes:
    """Runs one program and its judge. Why it was ended, its exit status, what it was refused, its output."""
    output, output_end = os.pipe()
    life, life_end = os.pipe()
    questions, questions_end = os.pipe()
    answers, answers_end = os.pipe()
    watcher, watched = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)

    def be_judge() -> None:
        _be_judge(len(cells), limits, protections, tests, [answers, questions_end, verdicts, life_end])

    def be_program() -> None:
        files = [output_end, output_end, questions, answers_end, watched.fileno()]
        _confine(limits, protections, files, judge=False)
        sandbox_program.run(cells, 3, 4)

    judge = _fork(be_judge)
    program = _fork(be_program) if cells else 0
    for end in (output_end, life_end, questions, questions_end, answers, answers_end):
        os.close(end)
    watched.close()
    refusals = Refusals(watcher) if program else None
    watcher.close()
    why, status, written = _watch(program, judge, output, life, requests, refusals, limits)
    refused = refusals.close() if refusals is not None else ""
    os.close(output)
    os.close(life)
    return f"{why}\n{status}\n{refused}\n".encode() + written


def main() -> None:
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this file's directory (Python 3.10)
    tests, verdicts = map(int, sys.argv[1:])
    requests, replies, null = os.dup(0), os.dup(1), os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if sys.platform == "linux" and hasattr(_libc, "mallopt"):
        _libc.mallopt(-8, 1)  # M_ARENA_MAX: else each thread reserves 64 MB of the addresses that are counted as memory
    protections = lock_in()
    _write(replies, " ".join(protections.active).encode())
    serve(requests, replies, tests, verdicts, protections)
    os._exit(0)  # nothing to tidy up


if __name__ == "__main__":
    main()
