"""The `bmtrain-ms` command. A package of its own, so that it starts ranks without importing MindSpore first."""
