"""Lets `python -P -m npc_runtime` stand in for the `npc-runtime` command."""

from npc_runtime.cli import main

main()
