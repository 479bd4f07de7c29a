"""A trampoline between the proxy and a child: it ties the child's life to the proxy's, then becomes it.

Run as `python -I -S launch.py <pid of the proxy> -- <program> <arguments...>`; with `++` in place of `--`, the program
may gain privileges, as the setuid helpers of containers do. On Linux the child then gets SIGKILL from the kernel when
the proxy dies, however it dies; it can gain no privileges otherwise, writes no core (one as large as the model), and is
the first to go when memory runs out. Elsewhere only the core limit is set.

It is a program of its own, not a `preexec_fn`, because code between fork and exec in a process with threads may
deadlock. It imports as little as it can: it costs about 12 ms.
"""

import _signal  # type: ignore[import-not-found]  # `signal` itself would cost as much as all the rest
import os
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
SIGKILL = 9
OOM_SCORE = 500


def tie_to(parent: int, confined: bool) -> None:
    """Die with `parent`; if `confined`, gain no privileges.

    The kernel looks at the *thread* that spawned us: `pool.spawn` uses the main one.
    """
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if confined:
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def be_modest() -> None:
    """No core dumps; killed before others when memory runs out. Both are best effort."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/oom_score_adj", "r+") as score:
            if int(score.read()) < OOM_SCORE:
                score.write(str(OOM_SCORE))
    except (ImportError, OSError, ValueError):
        pass


def main() -> None:
    """Bind this process to the proxy, limit it, and become the command behind `--`; exit status 127 if that fails."""
    tie_to(int(sys.argv[1]), sys.argv[2] == "--")
    be_modest()
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores them, and exec would pass that on
        _signal.signal(number, _signal.SIG_DFL)
    argv = sys.argv[3:]
    try:
        os.execvpe(argv[0], argv, os.environ)
    except OSError as exc:
        print(f"cannot run {argv[0]}: {exc.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
