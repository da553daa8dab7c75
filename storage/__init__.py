"""Everything the master keeps: one SQLite file, one connection that writes, any that only read."""
