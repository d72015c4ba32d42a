"""The pytest plugin: options, items, the engine of a process, rows, the terminal. One concern, one file."""
