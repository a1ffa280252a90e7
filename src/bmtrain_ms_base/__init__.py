"""What needs no MindSpore: the launcher and the ranks that it starts share these modules."""
