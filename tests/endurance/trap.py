"""Row 29's child: gives hostile files to commands, and says of each how it ended, what it cost, and what an audit hook saw.

Not a sandbox: what it watches for is written down and nothing else. A case that runs away is cut off by a timer.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import pickle
import resource
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import yaml

import mtl
from mtl.cli import app
from mtl.hardware import forget_peak_memory, peak_memory

STARTS = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen")
OVERRUN = 8.0
"""Seconds of its own time after which a case is cut off."""
ROOM = 2 << 30
"""Bytes of addresses beyond what is in use when the cases begin: one that fills memory fails, and the machine does not."""
CPU = torch.device("cpu")

seen: list[str] = []
usual: set[CodeType] = set()
"""Text that libraries make into code whenever a command runs, as for a named tuple."""
watching = False


class Overrun(BaseException):
    """A case took too long."""


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "exec" and not watching and isinstance(arguments[0], CodeType):
        usual.add(arguments[0])
    if not watching:
        return
    if event in STARTS or event == "pickle.find_class" or (event == "import" and str(arguments[0]).startswith("payload")):
        seen.append(f"{event} {arguments}"[:200])
    if event == "exec" and isinstance(code := arguments[0], CodeType) and code not in usual and not _is_installed(code):
        seen.append(f"exec of {code.co_filename}, {code.co_names}"[:200])


def _is_installed(code: CodeType) -> bool:
    places = (sys.prefix, sys.base_prefix, str(Path(mtl.__file__).parent.parent))
    return code.co_filename.startswith(("<frozen", *places))


def overran(number: int, frame: object) -> None:
    raise Overrun


def control(kind: str, file: Path) -> None:
    """What the payloads do where they are let: the trap must see it."""
    data = file.read_bytes()
    yaml.unsafe_load(data) if kind == "yaml" else pickle.loads(data)


def attempt(command: list[str]) -> tuple[str, str]:
    """How a command ended, and what it said."""
    text = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, OVERRUN)
    try:
        with redirect_stdout(text), redirect_stderr(text):
            if command[0] == "control":
                control(command[1], Path(command[2]))
                status = 0
            else:
                status = app(command, standalone_mode=False)
        return ("faults" if status == 1 else "accepted"), text.getvalue()
    except mtl.MTLError as error:
        return "refused", str(error)
    except Overrun:
        return "overran", text.getvalue()
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    global watching
    cases, canary = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    sys.path.append(str(canary.parent))  # where the payloads find a module
    torch.set_num_threads(1)
    sys.addaudithook(hook)
    signal.signal(signal.SIGPROF, overran)
    with redirect_stdout(io.StringIO()):
        for command in cases["good"]:  # whatever is imported late
            app(command, standalone_mode=False)
    gc.freeze()
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ROOM,) * 2)
    for name, command in cases["hostile"].items():
        gc.collect()
        seen.clear()
        importlib.invalidate_caches()
        forget_peak_memory(CPU)
        memory, started = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), time.process_time()
        watching = True
        ended, said = attempt(command)
        watching = False
        seconds, peak = time.process_time() - started, peak_memory(CPU)
        print(
            json.dumps(
                {
                    "name": name,
                    "ended": ended,
                    "said": said[:2000],
                    "seconds": seconds,
                    "megabytes": ((peak or 1 << 40) - memory) / 1e6,
                    "seen": seen,
                    "canary": canary.exists(),
                }
            ),
            flush=True,
        )
        canary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
