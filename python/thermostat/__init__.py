"""A service of one's own, complete: what `ipc-bridge export` puts into a new project."""
