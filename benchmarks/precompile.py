"""Triton's cache for the GPU machine, made on a machine that has no GPU.

    python benchmarks/precompile.py build                      # writes .gpu/triton-cache.tar.xz
    python benchmarks/precompile.py build --triton WHEEL ...   # with wheels that are here already
    python benchmarks/precompile.py build --add RESULTS.tar.gz # and what was compiled there before
    python benchmarks/precompile.py unpack                     # there, into TRITON_CACHE_DIR

On the GPU machine, compiling the kernels of `gpu_run.sh` takes minutes of the fifteen that it is
there. So the launchers are called here as that script calls them, while Triton believes in a GPU
and every launch ends after compiling.

Triton finds a compiled kernel by a hash over its source, its arguments, ptxas' version, and the
files of the installed Triton, whose library is another one for each Python. `build` compiles with
the wheel for this Python and puts in the library's hash of the wheel for the other. Cached files
also name each other by absolute paths; `unpack` writes those anew.

A cache of another Triton or Python is of no use and does no harm: everything is compiled then.
`unpack` needs the standard library only.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import HERE, ROOT, add_file, make_parser, with_paths
from gpu_suite import package_tree

ARCHIVE = "triton-cache.tar.xz"
MANIFEST = "manifest.json"
TRITON = "3.6.0"  # of the GPU machine, beside CPython 3.12
PYTHON = "3.12"
ARCH = 90  # H100 and H200
LARGEST = 4 << 20
LIBRARY = "triton/_C/libtriton.so"
GROUP = "__grp__"  # begins the name of the file that lists a kernel's others


def compiler_facts() -> dict[str, str | None]:
    """What a kernel's hash depends on, of the installed Triton; it is not imported."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return {"libtriton": None, "ptxas": None}
    folder = Path(spec.origin).parents[1]
    return facts_of(folder, (folder / LIBRARY).read_bytes())


def facts_of(folder: Path, library: bytes) -> dict[str, str | None]:
    """The same of an unpacked wheel, with the library of another."""
    bundled = folder / "triton" / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = os.environ.get("TRITON_PTXAS_PATH", str(bundled))
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True)
    return {"libtriton": hashlib.sha256(library).hexdigest(), "ptxas": said.stdout.strip()}


def archived_kernels(archive: Path) -> set[str]:
    """Folders of an archive, each a kernel's hash."""
    if not archive.exists():
        return set()
    with tarfile.open(archive) as tar:
        return {name.partition("/")[0] for name in tar.getnames() if "/" in name}


def unpack(archive: Path, cache: Path) -> None:
    """Put an archive's kernels into a cache, and say whether this Triton will find them."""
    if not archive.exists():
        print(f"there is no {archive.name}: everything will be compiled")
        return
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    manifest = json.loads((cache / MANIFEST).read_text())
    (cache / MANIFEST).unlink()
    write_groups(cache)
    here = compiler_facts()
    other = [key for key, value in here.items() if manifest[key] != value]
    use = f"of no use: another {', '.join(other)}" if other else "as this Triton looks for them"
    print(f"{manifest['kernels']} kernels, {use}")
    for key in other:
        print(f"{key}: {manifest[key]!r} there, {here[key]!r} here")


def write_groups(cache: Path) -> None:
    """List the files of each kernel, as Triton does it when it has compiled one."""
    for metadata in cache.glob("*/*.json"):
        if not metadata.name.startswith(GROUP):
            files = {path.name: str(path) for path in metadata.parent.glob(f"{metadata.stem}.*")}
            group = metadata.with_name(GROUP + metadata.name)
            group.write_text(json.dumps({"child_paths": files}))


def add_results(results: Path, cache: Path) -> None:
    """Put what a run of `gpu_run.sh` compiled into a cache: vLLM's kernels, and launchers."""
    with tarfile.open(results) as tar:
        for entry in tar:
            folder, _, name = entry.name.partition("/")
            if folder == "triton" and entry.isfile():
                entry.name = name
                tar.extract(entry, cache, filter="data")


def pack(cache: Path, archive: Path, facts: dict[str, Any]) -> int:
    """Write what a later run can use into an archive: how many kernels.

    Of each the machine code and its metadata; and the launchers, if there are any.
    """
    kinds = (".cubin", ".json", ".so")
    files = [path for path in sorted(cache.glob("*/*")) if path.suffix in kinds]
    files = [path for path in files if not path.name.startswith(GROUP)]
    count = sum(path.suffix == ".cubin" for path in files)
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        add_file(tar, MANIFEST, json.dumps(facts | {"kernels": count}).encode())
        for path in files:
            add_file(tar, f"{path.parent.name}/{path.name}", path.read_bytes())
    return count


def wheels(given: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Triton's wheel by its Python, ``cp312``; downloaded if it is not among those given."""
    found = {}
    for path in given:
        for wheel in [path] if path.is_file() else path.glob(f"triton-{TRITON}-*.whl"):
            found[wheel.name.split("-")[2]] = wheel
    for python in (OWN_TAG, tag(PYTHON)):
        if python not in found:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", f"--python-version={python[2:3]}.{python[3:]}"]
            command += [f"--dest={folder}", f"triton=={TRITON}"]
            subprocess.run(command, check=True)
            (found[python],) = folder.glob(f"triton-*-{python}-*.whl")
    return found


def tag(python: str) -> str:
    """As wheels have it: ``cp312`` for 3.12."""
    return "cp" + python.replace(".", "")


OWN_TAG = tag(f"{sys.version_info[0]}.{sys.version_info[1]}")


def install(wheel: Path, folder: Path) -> None:
    """Unpack a wheel; its programs can be run."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    for program in (folder / "triton/backends/nvidia/bin").iterdir():
        program.chmod(0o755)


def build(
    given: list[Path], archive: Path, processes: int, pattern: str, results: list[Path]
) -> int:
    """Compile all kernels, pack them, and prove with a fresh process that they are found.

    Args:
        given: wheels, or folders of them.
        archive: file that they are packed into.
        processes: number of processes to compile in.
        pattern: regular expression of the launches' names.
        results: tars of runs, whose kernels are packed too.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = wheels(given, folder)
        own = folder / "triton-own"
        install(found[OWN_TAG], own)
        with zipfile.ZipFile(found[tag(PYTHON)]) as file:
            facts = {"triton": TRITON, **facts_of(own, file.read(LIBRARY))}
        arguments = str(facts["libtriton"]), processes, pattern
        counts, seconds = timed(own, folder / "cache", *arguments)
        for tar in results:
            add_results(tar, folder / "cache")
        kernels = pack(folder / "cache", archive, facts)
        size = archive.stat().st_size
        print(f"{kernels} kernels, {counts['misses']} compiled, {seconds:.0f} s, {size} bytes")

        # Elsewhere, so that paths of the first cache would be missed.
        warm = folder / "warm"
        with tarfile.open(archive) as tar:
            tar.extractall(warm, filter="data")
        write_groups(warm)
        counts, seconds = timed(own, warm, *arguments)
        print(f"again with this cache: {counts['misses']} compiled, {seconds:.0f} s")
    if counts["misses"]:
        print("the cache is not found again")
    if size > LARGEST:
        print(f"{archive.name} is larger than {LARGEST} bytes")
    return int(counts["misses"] > 0 or size > LARGEST)


def timed(*arguments: Any) -> tuple[dict[str, int], float]:
    """What `compile_all` returns, and the seconds that it took."""
    begin = time.monotonic()
    return compile_all(*arguments), time.monotonic() - begin


def compile_all(
    triton: Path, cache: Path, library: str, processes: int, pattern: str
) -> dict[str, int]:
    """Call the launchers in processes that import another Triton; hits and misses of the cache."""
    command = [sys.executable, __file__, "compile", "--library", library, "--cases", pattern]
    counts = {"hits": 0, "misses": 0}
    with tempfile.TemporaryDirectory() as folder:
        environment = with_paths(
            triton,
            HERE,
            package_tree(Path(folder)),
            TRITON_CACHE_DIR=str(cache),
            TRITON_STORE_BINARY_ONLY="1",
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
        )
        environment.pop("TRITON_INTERPRET", None)
        running = [
            subprocess.Popen(
                [*command, "--share", f"{i}/{processes}"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]
        for process in running:
            said, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"compiling ended with status {process.returncode}")
            for key, value in json.loads(said.splitlines()[-1]).items():
                counts[key] += value
    return counts


def compile_share(library: str, share: str, pattern: str) -> dict[str, int]:
    """Compile a share of the launches; hits and misses of the cache."""
    import re

    import triton
    from kernel_launches import compiling
    from precompiled_launches import cases
    from triton.runtime import cache

    key = cache.triton_key()
    own = compiler_facts()["libtriton"]
    assert own is not None
    assert key.count(own) == 1, "Triton's key does not have the library's hash"
    key = key.replace(own, library)
    cache.triton_key = lambda: key
    counts = {"hits": 0, "misses": 0}

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["hits" if cache_hit else "misses"] += 1

    triton.knobs.compilation.listener = listener
    first, every = map(int, share.split("/"))
    chosen = [(name, run) for name, run in cases().items() if re.search(pattern, name)]
    with compiling(ARCH):
        for name, run in chosen[first::every]:
            begin, before = time.monotonic(), counts["misses"]
            run()
            seconds = time.monotonic() - begin
            print(f"{name}: {counts['misses'] - before} kernels, {seconds:.1f} s", file=sys.stderr)
    return counts


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=["build", "unpack", "compile"])
    archive = ROOT / ".gpu" / ARCHIVE
    parser.add_argument("--archive", type=Path, default=archive, help="default: .gpu/" + ARCHIVE)
    parser.add_argument(
        "--triton", type=Path, nargs="*", default=[], help="wheels or folders of them"
    )
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="tars of gpu_run.sh")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--cases", default="", help="of these names only: a regular expression")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "unpack":
        unpack(args.archive, Path(os.environ["TRITON_CACHE_DIR"]))
        return 0
    if args.command == "compile":
        print(json.dumps(compile_share(args.library, args.share, args.cases)))
        return 0
    return build(args.triton, args.archive, args.processes, args.cases, args.add)


if __name__ == "__main__":
    sys.exit(main())
