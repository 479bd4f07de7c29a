"""The documents: Debian packages, unpacked without being installed, and what of them is read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    *("perl-doc", "python3.11-doc", "postgresql-doc-15", "git-doc", "sqlite3-doc"),
    *("debian-handbook", "debian-reference-en"),
)
"""Of Debian 12. Another release has other numbers in their names, and other figures come out."""
PODS = "usr/share/perl/*/pod/*.pod"
FAQS = "usr/share/perl/*/pod/perlfaq[1-9].pod"
RST = "usr/share/doc/python3.*[0-9]/html/_sources/faq/*.rst.txt"
HTML = (
    "usr/share/doc/python3.*[0-9]/html/**/*.html",
    "usr/share/doc/postgresql-doc-*/html/*.html",
    "usr/share/doc/git-doc/**/*.html",
    "usr/share/doc/sqlite3/**/*.html",
    "usr/share/doc/debian-handbook/html/en-US/*.html",
    "usr/share/debian-reference/*.en.html",
    "usr/share/doc/debian-reference*/docs/*.en.html",
)
LISTS = re.compile(
    r"/(?:contents|genindex[^/]*|search|bookindex|py-modindex|faq/[^/]*)\.html$|/perl(?:faq\d?|toc)\.pod$|/RelNotes/"
)
"""What lists the questions, or is no text."""


def unpack(folder: Path) -> Path:
    """The folder with the content of the packages, which are fetched if they are not there."""
    root, packages = folder / "root", folder / "packages"
    if not root.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
        for package in sorted(packages.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
        (folder / "unpacked").rename(root)
    return root


def documents(root: Path) -> Iterator[Path]:
    """All files that are read but for the questions and answers, in a fixed order."""
    for pattern in (PODS, *HTML):
        for path in sorted(root.glob(pattern)):
            if path.is_file() and not path.is_symlink() and not LISTS.search(path.as_posix()):
                yield path
