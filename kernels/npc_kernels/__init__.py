"""The numeric kernels of npc-runtime. Knows tensors; knows nothing of personas, lines or sockets."""
