"""A crawler cluster that needs no broker: one master, any number of workers, SQLite underneath."""

__version__ = "0.1.0"
