"""Writes the table of docs/config.md from the core's own table of keys.

``python docs/config_table.py`` rewrites the page in place; tests/test_config.py holds the page to the same rows.
"""
import json
import pathlib

PAGE = pathlib.Path(__file__).resolve().parent / "config.md"
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"
HEAD = "| key | type | default | allowed | status | effect |\n|---|---|---|---|---|---|\n"


def cell(text):
    """Text that cannot break a table."""
    return text.replace("|", "\\|")


def line(row):
    """One row of config_keys() as a line of the table."""
    section = row["type"] == "section"  # its keys have defaults and a status, it has none
    return "| " + " | ".join([f"`{row['path']}`", row["type"], "" if section else f"`{json.dumps(row['default'])}`",
                              cell(row["allowed"]), "" if section else row["status"], cell(row["help"])]) + " |\n"


def table(rows):
    """The whole table."""
    return HEAD + "".join(line(row) for row in rows)


def main():
    """Rewrites the part of the page between the two marks."""
    from deepspeed_c import _core

    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table(_core.config_keys()) + END + after)


if __name__ == "__main__":
    main()
