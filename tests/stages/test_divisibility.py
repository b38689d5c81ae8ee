"""Parallel sizes that do not divide a model are refused, all of them together, and what a refusal offers works."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Problem
from pipeline.model.parallelism import Parallelism
from stages.shard import Embedding, Sharding, divisibility
from tests.support.examples import examples
from tests.support.rank_oracle import model_of, sharding_of


def fits(sharding: Sharding) -> bool:
    """The sizes must divide what is split (docs/format/checkpoint.md, sections 2, 6 and 12)."""
    model, sizes = sharding.model, sharding.parallelism
    t, kv_heads, experts = sizes.tp_size, model.num_key_value_heads, model.num_experts
    split_hidden = sharding.embedding.parallel and sharding.embedding.dim == 1
    rules = [
        model.num_attention_heads % t == 0,
        (t % kv_heads if kv_heads < t else kv_heads % t) == 0,
        not split_hidden or model.hidden_size % t == 0,
        sizes.pp_size <= model.num_hidden_layers,
        sizes.moe_tp_size * sizes.moe_ep_size == t,
    ]
    if experts:
        rules += [experts % sizes.moe_ep_size == 0, model.intermediate_size % sizes.moe_tp_size == 0, sizes.cp_size == 1]
    else:
        rules += [model.intermediate_size % t == 0, sizes.moe_ep_size == 1]
    return all(rules)


@st.composite
def any_sizes(draw: st.DrawFn) -> Sharding:
    """Models and sizes that need not fit."""
    kv_heads = draw(st.integers(1, 6))
    model = model_of(
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_size=2,
        hidden=draw(st.integers(1, 24)),
        inner=draw(st.integers(1, 24)),
        vocab=draw(st.integers(1, 24)),
        layers=draw(st.integers(1, 4)),
        num_experts=draw(st.sampled_from([0, 0, 2, 4, 6])),
    )
    parallelism = Parallelism.resolve(
        draw(st.integers(1, 8)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([1, 1, 2])),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 4)),
    )
    return sharding_of(model, parallelism, Embedding(draw(st.booleans()), draw(st.integers(0, 1))))


def offered(problems: list[Problem], option: str) -> list[int] | None:
    """The sizes that a refusal of `option` lists; None where it is not refused with a list."""
    for problem in problems:
        if problem.subject.startswith(f"--{option} ") and problem.expected.startswith("one of: "):
            listed = problem.expected.removeprefix("one of: ")
            return [] if listed == "none" else [int(n) for n in listed.split(", ")]
    return None


@examples(400)
@given(any_sizes())
def test_only_what_does_not_fit_is_refused(sharding: Sharding) -> None:
    assert (divisibility(sharding) == []) == fits(sharding)


@examples(400)
@given(any_sizes())
def test_every_tp_size_that_a_refusal_lists_works(sharding: Sharding) -> None:
    for n in offered(divisibility(sharding), "tp_size") or ():
        # With some sizes for the experts, and one pipeline stage, as neither is what is listed.
        trials = [Parallelism(n, 1, 1, n // ep, ep) for ep in range(1, n + 1) if n % ep == 0]
        assert any(fits(replace(sharding, parallelism=trial)) for trial in trials), n


@st.composite
def expert_sizes(draw: st.DrawFn) -> Sharding:
    """Experts of sizes that need not fit, in models whose attention does."""
    tp = draw(st.integers(1, 8))
    model = model_of(tp, tp, 2, tp, draw(st.integers(1, 24)), 7, 1, num_experts=draw(st.integers(1, 8)))
    return sharding_of(model, Parallelism(tp, 1, 1, draw(st.integers(1, 8)), draw(st.integers(1, 8))))


@examples(400)
@given(expert_sizes(), st.sampled_from(["moe_tp_size", "moe_ep_size"]))
def test_every_expert_size_that_a_refusal_lists_works(sharding: Sharding, option: str) -> None:
    tp, problems = sharding.parallelism.tp_size, divisibility(sharding)
    # Where no sizes of the experts fit, it is tp_size that has to change.
    for n in offered(problems, option) or () if offered(problems, "tp_size") is None else ():
        assert tp % n == 0, n
        moe_tp, moe_ep = (n, tp // n) if option == "moe_tp_size" else (tp // n, n)
        assert fits(replace(sharding, parallelism=Parallelism(tp, 1, 1, moe_tp, moe_ep))), n


@pytest.mark.parametrize(
    ("changed", "parallelism", "option", "found"),
    [
        (
            {"num_attention_heads": 9, "num_key_value_heads": 1},
            Parallelism(2, moe_tp_size=2),
            "--tp_size 2",
            "num_attention_heads 9",
        ),
        ({"num_key_value_heads": 3}, Parallelism(2, moe_tp_size=2), "--tp_size 2", "num_key_value_heads 3"),
        ({"num_key_value_heads": 4}, Parallelism(6, moe_tp_size=6), "--tp_size 6", "num_key_value_heads 4"),
        ({"intermediate_size": 9}, Parallelism(2, moe_tp_size=2), "--tp_size 2", "intermediate_size 9"),
        ({"hidden_size": 9}, Parallelism(2, moe_tp_size=2), "--tp_size 2", "hidden_size 9"),
        ({}, Parallelism(1, 3), "--pp_size 3", "2 layers"),
        ({}, Parallelism(2, moe_ep_size=2), "--moe_ep_size 2", "a model without experts"),
        ({"num_experts": 3}, Parallelism(2, moe_ep_size=2), "--moe_ep_size 2", "3 experts"),
        ({"num_experts": 2, "intermediate_size": 9}, Parallelism(2, moe_tp_size=2), "--moe_tp_size 2", "intermediate_size 9"),
        ({"num_experts": 2}, Parallelism(1, cp_size=2), "--cp_size 2", "2 experts"),
        ({"num_experts": 2}, Parallelism(4, moe_tp_size=2), "--moe_tp_size 2 x --moe_ep_size 1", "2"),
    ],
)
def test_each_rule_names_its_option_and_its_size(
    changed: dict[str, int], parallelism: Parallelism, option: str, found: str
) -> None:
    model = replace(model_of(heads=12, kv_heads=12, head_size=2, hidden=12, inner=12, vocab=7, layers=2), **changed)
    (problem,) = divisibility(sharding_of(model, parallelism, Embedding(parallel=True, dim=1)))
    assert (problem.subject, problem.found) == (option, found)


def test_all_that_does_not_fit_is_reported_together() -> None:
    model = model_of(6, 3, 2, 8, 8, 8, 2, num_experts=4)
    problems = divisibility(sharding_of(model, Parallelism(4, 3, 1, 1, 3)))
    assert [problem.subject.split()[0] for problem in problems] == ["--moe_tp_size", "--tp_size", "--pp_size", "--moe_ep_size"]
    assert all(problem.found and problem.expected for problem in problems)
