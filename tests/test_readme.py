"""The README's code runs as it stands, its file tree is the real one, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from npc_runtime.persona import Persona

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_example_runs(daemon):
    (code,) = blocks("python")
    code = code.replace("4780", str(daemon.endpoint["port"])).replace("TOKEN", daemon.token)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "odo said:" in done.stdout
    assert "vaskar says:" in done.stdout


def test_the_persona_example_is_valid():
    (text,) = blocks("yaml")
    persona = Persona.model_validate(YAML(typ="safe").load(text))
    assert persona.adapter_name == "odo"


def test_the_persona_page_has_every_field_and_its_example_is_valid():
    page = (ROOT / "docs" / "persona.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(field.alias or name for name, field in Persona.model_fields.items())
    (text,) = blocks("yaml", page)
    head = "schema: 1\nid: odo\ndisplay_name: Odo\nbio: B\n"
    assert Persona.parse((head + text).encode(), Path("odo")).asked_facts == ["day", "quest.dragon", "said", "speaker"]


def test_the_file_tree_is_the_real_one():
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"(\w+\.py)\b", tree))
    real = {path.name for folder in ("npc_runtime", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert named == real - {"__init__.py", "__main__.py"}


def test_the_commands_exist():
    for command in re.findall(r"`npc-runtime (\w+)", README):
        done = subprocess.run([sys.executable, "-P", "-m", "npc_runtime", command, "--help"], capture_output=True)
        assert done.returncode == 0, command
