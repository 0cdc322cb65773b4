"""The source tree as the rules see it: which files it has, C text without comments and strings, functions of a file."""
import functools
import pathlib
import re
import subprocess
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@functools.cache
def files():
    """Paths of the tree, relative to its root: what git tracks or would track; all files where git is not there."""
    run = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        names = [name for name in run.stdout.splitlines() if (ROOT / name).is_file()]
    else:
        skipped = {".venv", "build", "dist", "__pycache__", ".git", ".pytest_cache", ".ruff_cache"}
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")
                 if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)]
    return sorted(names)


def c_files(folder="csrc"):
    return [name for name in files() if name.startswith(folder + "/") and name.endswith((".c", ".h"))]


def read(name):
    return (ROOT / name).read_text()


def blank(match):
    return re.sub(r"[^\n]", " ", match.group())


def code(text):
    """C text with comments and the insides of strings blanked; lines and columns stay where they are."""
    token = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(token, lambda m: blank(m) if m.group()[0] == "/" else m.group()[0] + blank(m)[2:] + m.group()[-1],
                  text, flags=re.S)


@dataclass
class Function:
    file: str
    name: str
    first: int  # line of the start of its signature
    n_lines: int  # to its closing brace


def functions(name):
    """Functions that a C file defines. The format is fixed: a body ends with a brace in the first column."""
    lines = code(read(name)).split("\n")
    found, start = [], None
    for number, line in enumerate(lines, 1):
        if start is None and re.match(r"[A-Za-z_].*\(", line) and not line.rstrip().endswith(";"):
            start = number
        elif start is not None and line.startswith("}"):
            signature = " ".join(lines[start - 1:number]).split("{")[0]
            # The name stands before the first parenthesis that is not an attribute's.
            called = re.search(r"(\w+)\s*\((?!\()", re.sub(r"__attribute__\s*\(\(.*?\)\)", "", signature))
            found.append(Function(name, called.group(1) if called else "?", start, number - start + 1))
            start = None
        elif start is not None and line.rstrip().endswith(";") and not line.startswith((" ", "\t")):
            start = None  # a declaration over several lines
        elif start is not None and line.strip() == "":
            body = "\n".join(lines[start - 1:number])
            start = start if "{" in body else None
    return found
