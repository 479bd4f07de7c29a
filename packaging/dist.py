"""Builds the source distribution and the wheel, byte for byte the same from the same sources.

Usage: python packaging/dist.py [FOLDER]; the folder is dist by default. Requires git and setuptools. All times are
$SOURCE_DATE_EPOCH, by default the time of the last commit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def main(target: Path) -> None:
    """Write both files to `target`, and print their digests."""
    os.umask(0o022)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct"))
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0"}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, built = folder / "sources", folder / "built"
        export(sources)
        built.mkdir()
        run_build("build_sdist", sources, built, env)
        [raw] = built.iterdir()
        sdist = target / raw.name
        sdist.write_bytes(normalized(raw.read_bytes(), epoch))
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        run_build("build_wheel", folder / raw.name.removesuffix(".tar.gz"), target.resolve(), env)
    for file in sorted(target.iterdir()):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}")


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout


def export(folder: Path) -> None:
    """A copy of what git knows of, so that nothing left over from earlier builds gets in."""
    for name in filter(None, git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")):
        source, copy = ROOT / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        elif source.exists():
            copy.write_bytes(source.read_bytes())
            copy.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def run_build(step: str, sources: Path, target: Path, env: dict[str, str]) -> None:
    """One step of setuptools, in a process of its own: it changes its working folder."""
    done = subprocess.run([sys.executable, "-c", BUILD, step, str(target)], cwd=sources, env=env, capture_output=True)
    if done.returncode != 0:
        sys.exit(done.stdout.decode() + done.stderr.decode())


def normalized(data: bytes, epoch: int) -> bytes:
    """An archive with its members in order, at one time, of no one's, with usual permissions."""
    written = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as before,
        gzip.GzipFile(filename="", mode="wb", fileobj=written, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            content = before.extractfile(member)
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            after.addfile(member, content)
    return written.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist")
