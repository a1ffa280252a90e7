"""Runs a module by its name, as `python -m` does: launchers start files (`bmtrain-ms launch -m`)."""

import os
import runpy
import sys
import warnings

if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    del sys.argv[0]
    # bmtrain_ms imports its modules itself: the one that runs is a second copy, which does no harm
    warnings.filterwarnings("ignore", "'bmtrain_ms.* found in sys.modules", RuntimeWarning)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
