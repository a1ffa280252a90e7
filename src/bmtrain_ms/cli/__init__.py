"""The `bmtrain-ms` command."""
