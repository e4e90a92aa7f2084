"""npc-runtime: a local daemon that voices the NPCs of a game."""

__version__ = "0.1.0"
__all__ = ["__version__"]
