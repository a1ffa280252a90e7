"""What other people's code computes for tiny models: see `make.py`."""
