"""One file for each peer. A file holds `CONTESTANTS`, a tuple of rows, and is found by being here."""
