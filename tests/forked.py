"""The command as a process of its own, forked from one that has imported what takes seconds to import.

It is the whole command, with its own arguments, streams, environment and exit status, and signals reach it; only the
imports are shared. LanceDB is not among them: its threads would not survive the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "scipy.stats",
        "lance_namespace",
        "pyarrow.dataset",
        "transformers.models.llama.modeling_llama",
        "embell.engine.encoder",
        "embell.training.contrastive",
    ]
)


class Started:
    """A command that runs, or has run."""

    def __init__(self, args: Sequence[str], input: str = "", cwd: Path | None = None, **env: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        streams = [Path(self._folder.name, name) for name in ("in", "out", "err")]
        streams[0].write_text(input, encoding="utf-8")
        self._out, self._err = streams[1:]
        variables = {**os.environ, **env}
        self._process = _context.Process(target=_run, args=(list(args), [str(path) for path in streams], cwd, variables))
        self._process.start()

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once, as the kernel would when memory runs out."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """Wait for the end: exit status, stdout, stderr."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s")
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in (self._out, self._err))
        self._folder.cleanup()
        return status, out, err


def _run(args: list[str], streams: list[str], cwd: Path | None, env: dict[str, str]) -> None:
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, encoding="utf-8") for number, mode in enumerate("rww"))
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["embell", *args]
    from embell.cli.main import main

    main()
