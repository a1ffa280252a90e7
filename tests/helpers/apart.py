"""`pytest --apart`: each axis of a world has an engine of its own, also where its ranks are all.

A world gives `everyone` for such an axis, so code that takes one where the other is meant works by chance. Here it meets engines
that are different objects; those of real ranks are groups of their own, whose operations meet nobody who asked the other one.
"""

from __future__ import annotations

import copy
import os

APART = "BMTRAIN_MS_TEST_APART"  # for the processes of rank pools


def set_apart() -> None:
    """Have every world of this process be made so from now on, if the environment asks for it."""
    if os.environ.get(APART) != "1":
        return
    from bmtrain_ms.comm import Engine, World
    from bmtrain_ms.comm.host import HostEngine

    make = World._make

    def made_apart(self: World, axis: str) -> Engine:
        engine = make(self, axis)
        if engine is not self.everyone:
            return engine
        return engine.subgroup(range(engine.size)) if isinstance(engine, HostEngine) else copy.copy(engine)

    World._make = made_apart  # type: ignore[method-assign]
