"""The object store of one node: where values lie (`arena`), in which memory (`memory`), in which form (`serialization`), and when that is full (`spill`)."""
