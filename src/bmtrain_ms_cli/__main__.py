"""`python -m bmtrain_ms_cli`, also what the launchers start."""

from bmtrain_ms_cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
