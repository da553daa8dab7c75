"""The HTTP face of a master: a client of the core like any other, with rules for strangers."""
