"""Plans of which nothing is compiled: for what they tell from shapes alone."""

import types

import jax

from instella_jax.planning import plan


def compile_nothing(monkeypatch):
    """Makes `plan.measure` trace and lower a step only; gradients and temporaries are then 0."""
    nothing = types.SimpleNamespace(temp_size_in_bytes=0)
    compiled = types.SimpleNamespace(memory_analysis=lambda: nothing)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda _: compiled)
    monkeypatch.setattr(plan, "working_bytes", lambda *_: 0)
