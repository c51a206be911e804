"""Prints the dependencies of pyproject.toml, and those of the extras named: `python docker/requirements.py runner`.

They are installed before the code is copied, so that a change of the code alone rebuilds one small layer.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for extra in sys.argv[1:]:
    project["dependencies"] += project["optional-dependencies"][extra]
sys.stdout.write("".join(f"{line}\n" for line in project["dependencies"]))
