"""Nothing is written that does not parse, that ruff objects to, or whose imports fail."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

from sheer.eject.program import Refusal

RULES = "E4,E7,E9,F"  # syntax, names and imports: what may be wrong with a file, not how it looks


def verify(text: str, original: str) -> None:
    """See that a file can be run; of what ruff says, what is about the user's own lines is passed over.

    Raises:
        Refusal: it cannot; that is an error of the ejector.
    """
    tree = ast.parse(text)
    own = set(original.splitlines()) | set(_without_the_library(original))
    lines = text.splitlines()
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", RULES, "--output-format", "json", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = [f for f in json.loads(done.stdout or "[]") if lines[f["location"]["row"] - 1] not in own]
    if found or not done.stdout:
        said = "; ".join(f"line {f['location']['row']}: {f['message']}" for f in found) or done.stderr.strip()
        raise Refusal(
            f"What was made of the script is not sound, which is an error of the ejector. Please report it: {said}."
        )
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    code = "\n".join(ast.unparse(node) for node in imports if node not in _of_user(tree, own, lines))
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise Refusal(f"The ejected script's imports fail: {tried.stderr.strip().splitlines()[-1]}.")


def _of_user(tree: ast.Module, own: set[str], lines: list[str]) -> list[ast.stmt]:
    """Return the imports that the script had before, which were run when it was captured."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and lines[node.lineno - 1] in own
    ]


def _without_the_library(original: str) -> list[str]:
    """Return the imports of a script from which the library is taken out, as they are written then."""
    found = [node for node in ast.walk(ast.parse(original)) if isinstance(node, ast.Import)]
    left = [[alias for alias in node.names if alias.name != "sheer"] for node in found]
    return [ast.unparse(ast.Import(aliases)) for aliases in left if aliases]
