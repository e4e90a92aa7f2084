"""How far a persona is itself: losses, generated lines and tests. `npc_runtime.evaluate` puts the parts together."""
