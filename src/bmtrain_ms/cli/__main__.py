"""`python -m bmtrain_ms.cli`, also what the launchers start."""

from bmtrain_ms.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
