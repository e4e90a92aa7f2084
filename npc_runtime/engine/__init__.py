"""The engine: one base model, many adapters, one batch. Knows token ids and text; knows nothing of sockets."""
