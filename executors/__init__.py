"""Task types, and the child processes in which they run. docs/executors.md tells it in order."""
