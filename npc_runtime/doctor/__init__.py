"""`npc-runtime doctor`: what is installed, what will compute, what would be slow, what is wrong, and what to do."""
