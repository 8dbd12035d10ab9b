"""The step asks the device for nothing, and traces as one graph: what `torch.compile` and CUDA graphs need.

Both are shown without a GPU: tensors of the device `meta` have no values to ask for, and a traced function may not
branch on one either. In a process of its own, because the tests' jaxtyping hook can't be traced.
"""

import textwrap

import pytest
from commands import run_in_fork

SLOW = pytest.mark.slow

COMMON = """
    import torch
    from dataclasses import replace
    from trainer.recipe import PRESETS
    from trainer.sae import init_sae
    from trainer.train import start

    torch.set_num_threads(1)
    SIZES = {"mean": torch.zeros(24), "sample": torch.randn(300, 24, generator=torch.Generator().manual_seed(1)) / 5}

    def fresh(recipe, device="cpu"):
        return start("sae", init_sae(24, 96, recipe, device=device, **SIZES), 100)
"""


def run(code):
    done = run_in_fork(execute, textwrap.dedent(COMMON) + textwrap.dedent(code), timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def execute(code):
    exec(compile(code, "code", "exec"), {"__name__": "code"})


def test_the_step_asks_the_device_for_nothing():
    """But for lazy Adam, which counts. (On a CPU TopK looks whether any latent is dead; `meta` takes a GPU's path.)"""
    found = run("""
        recipes = dict(PRESETS)
        recipes |= {f"{name} in bfloat16": replace(recipe, compute="bfloat16") for name, recipe in PRESETS.items()}
        other = {"architecture": "gated"}, {"architecture": "topk", "k": 8}, {"lazy_adam": True}
        recipes |= {str(change): replace(PRESETS["gemma_scope"], **change) for change in other}
        for name, recipe in recipes.items():
            sae = fresh(recipe, "meta")
            try:
                for step in range(3):
                    sae.step(torch.empty(64, 24, device="meta"), None, step, 100)
                print(name, "ok", sep=": ")
            except (RuntimeError, NotImplementedError) as error:
                print(name, "asks", sep=": ")
    """)
    verdict = dict(line.rsplit(": ", 1) for line in found.splitlines())
    assert {name for name, what in verdict.items() if what != "ok"} == {"{'lazy_adam': True}"}
    assert len(verdict) == 11


@pytest.mark.parametrize("names", ["gemma_scope anthropic_2025", pytest.param("gemma_scope_2 short", marks=SLOW)])
def test_the_step_traces_as_one_graph(names):
    """The same numbers step for step; two graphs at most: the first step's and one with the step as a variable."""
    graphs = run(
        """
        from torch._dynamo.utils import counters
        for recipe in map(PRESETS.__getitem__, "NAMES".split()):
            torch._dynamo.reset()
            counters.clear()
            plain, traced = fresh(recipe), fresh(recipe)
            step = torch.compile(traced.step, fullgraph=True, backend="eager")
            for i in range(4):
                x = torch.randn(64, 24, generator=torch.Generator().manual_seed(i)) / 5
                a, b = plain.step(x, None, i, 100), step(x, None, i, 100)
                torch.testing.assert_close(tuple(b), tuple(a), rtol=1e-5, atol=1e-6)
            moved = (fresh(recipe).sae.W_dec - plain.sae.W_dec).abs().max()
            for key, tensor in plain.state.items():
                torch.testing.assert_close(traced.state[key], tensor, rtol=1e-4, atol=1e-3 * float(moved), msg=key)
            print(counters["stats"]["unique_graphs"])
    """.replace("NAMES", names)
    )
    assert [int(n) <= 2 for n in graphs.split()] == [True] * 2


@pytest.mark.slow
def test_gradients_compile():
    """With torch's own compiler, as far as it goes on a CPU: 2.13 fails on the decoder's row norms (docs/log.md)."""
    run("""
        for recipe in PRESETS.values():
            sae, x = fresh(recipe).sae, SIZES["sample"]
            compiled = torch.compile(lambda x: sae.loss_and_gradients(x, 0.1), fullgraph=True)
            (a, s), (b, t) = sae.loss_and_gradients(x, 0.1), compiled(x)
            torch.testing.assert_close((b, tuple(t)), (a, tuple(s)), rtol=1e-4, atol=1e-5)
    """)
