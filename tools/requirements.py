"""Prints requirement lists of pyproject.toml, one word a requirement, so that they stand in one place.

Usage: requirements.py project.dependencies build-system.requires ...
"""
import sys

try:
    import tomllib
except ImportError:  # Python 3.10: pip carries a reader of its own
    from pip._vendor import tomli as tomllib


def requirements(table, path):
    for key in path.split("."):
        table = table[key]
    return [requirement.replace(" ", "") for requirement in table]


if __name__ == "__main__":
    with open("pyproject.toml", "rb") as text:
        whole = tomllib.load(text)
    print(*(word for path in sys.argv[1:] for word in requirements(whole, path)))
