"""Damaged files that are bred for what they reach in the readers; needs ``pip install atheris``.

``python tests/coverage_fuzzing.py READER SECONDS FOLDER`` breeds files from those of ``tests/fuzzing.py`` for so
long. It keeps in ``FOLDER/corpus`` what led to new lines and in ``FOLDER/found`` an input for each thing that went
wrong: an exception that is none of ours, more than five seconds, more than a gigabyte, something run or connected to,
or the end of the process. What it finds becomes a test that makes such a file; the tests themselves do without
atheris.

The first byte of an input tells which file of a folder it is, the others are what is in that file.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

#: Anything of this kind is code run, or a way out; no reader does it.
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")


def resident(peak: bool) -> int:
    """Bytes of memory of this process, now or at most since the peak was last forgotten."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)" if peak else r"VmRSS:\s*(\d+)", text)[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def breed(name: str, seconds: int, folder: Path) -> None:
    """One process of libFuzzer on one reader."""
    import atheris

    with atheris.instrument_imports(include=["napari_calvae"]):
        from fuzzing import BYTES, READERS, SECONDS, damage, refusals

        import napari_calvae.formats.growing
        import napari_calvae.vae  # noqa: F401
    warnings.simplefilter("ignore")
    make, read = READERS[name]
    home = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    whole = make(Path(home.name))
    read(whole)
    files = sorted(p for p in ([whole] if whole.is_file() else whole.rglob("*")) if p.is_file())
    intact = [path.read_bytes() for path in files]
    corpus, found = folder / "corpus", folder / "found"
    for place in (corpus, found):
        place.mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(intact[:256]):
        (corpus / f"intact-{k}").write_bytes(bytes([k]) + data)
    known: set[str] = {path.name for path in found.iterdir()}
    running = False

    def watch(event: str, _: object) -> None:
        if running and event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} while a file is read")

    def too_long(*_: object) -> None:
        raise TimeoutError("took too long")

    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, too_long)  # seconds of this process, whatever else the machine has to do
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resident(False) + 4 * BYTES, most))

    def keep(data: bytes, what: str, error: BaseException | None = None) -> None:
        at = [f"{Path(f.filename).stem}.{f.lineno}" for f in traceback.extract_tb(error and error.__traceback__)]
        label = re.sub(r"\W+", "_", f"{what}-{'-'.join(at[-2:])}")[:120]
        if label not in known:
            known.add(label)
            (found / label).write_bytes(data)
            told = "".join(traceback.format_exception(error)) if error else what
            (found / f"{label}.txt").write_text(told)

    def one(data: bytes) -> None:
        nonlocal running
        number = (data[0] if data else 0) % len(files)
        files[number].write_bytes(data[1:])
        before = resident(False)
        forget_peak()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        running = True
        try:
            read(whole)
        except refusals(name):
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, it should have been one of ours
            keep(data, type(error).__name__, error)
        finally:
            running = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            files[number].write_bytes(intact[number])
        if resident(True) - before > BYTES:
            keep(data, "gigabyte")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        rest = atheris.Mutate(data[1:], max_size - 1) if rng.random() < 0.5 else damage(data[1:], rng)
        return (data[:1] + rest)[:max_size]

    limits = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=8000", f"-artifact_prefix={found}/ended-"]
    size = [f"-max_len={max(map(len, intact)) + 1000}", "-len_control=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *size, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def main(name: str, seconds: int, folder: Path) -> None:
    """Breed until the time is over, in a process that is begun anew where it ended, and say what came of it."""
    begun, runs, edges, ends = time.monotonic(), 0, 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    while (left := int(seconds - (time.monotonic() - begun))) > 0:
        command = [sys.executable, __file__, "--one", name, str(left), str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", check=False)
        (folder / "log.txt").write_text(done.stdout)
        counts = re.findall(r"^#(\d+)\s.*?cov: (\d+)", done.stdout, re.M)
        if not counts:
            print(done.stdout[-2000:])  # noqa: T201
            break
        runs, edges = runs + int(counts[-1][0]), max(edges, int(counts[-1][1]))
        ends += done.returncode != 0
    minutes = round((time.monotonic() - begun) / 60, 1)
    found = sorted(path.name for path in (folder / "found").glob("*") if path.suffix != ".txt")
    print(json.dumps({"reader": name, "minutes": minutes, "files": runs, "edges": edges, "ends": ends, "found": found}))  # noqa: T201


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    *_, reader, length, place = sys.argv
    (breed if sys.argv[1] == "--one" else main)(reader, int(length), Path(place))
