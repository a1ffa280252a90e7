"""Choosing tokens, and generating with a cache."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import Mesh, RecordingEngine, SimulatedEngine, SingleEngine, World, use_world
from bmtrain_ms.compat.autograd import no_grad
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.generation import choose, generate, stop_strings
from bmtrain_ms.model_center.layer import KeyValueCache
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.zero import context_of, unwritten
from tests.golden.models import FOLDER, NEW_TOKENS, PROMPTS, SEARCHES
from tests.unit.test_families import model_of

SIZES = {"vocab_size": 37, "dim_model": 24, "num_heads": 4, "num_heads_kv": 2, "dim_ff": 40, "num_layers": 2}


@pytest.fixture
def model(single_world):
    made = spread(Llama(LlamaConfig(**SIZES, init_std=0.3)))
    bms.init_parameters(made)
    return made


def logits_of(*probabilities):
    return np.log(np.array([probabilities]))


def frequencies(logits, **how):
    draws = (np.arange(1000) + 0.5) / 1000
    picked = choose(np.repeat(logits, 1000, 0), draws, **how)
    return (np.bincount(picked, minlength=logits.shape[1]) / 1000).round(3).tolist()


def test_choose_follows_the_distribution():
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert frequencies(logits) == [0.1, 0.4, 0.2, 0.3]
    assert frequencies(logits, temperature=0.0) == [0, 1, 0, 0]
    assert frequencies(logits, top_k=1) == [0, 1, 0, 0]
    assert frequencies(logits, top_k=2) == [0, 0.571, 0, 0.429]
    assert frequencies(logits, top_p=0.39) == [0, 1, 0, 0]
    assert frequencies(logits, top_p=0.41) == [0, 0.571, 0, 0.429]
    assert frequencies(logits, top_p=1e-9) == [0, 1, 0, 0]
    np.testing.assert_allclose(frequencies(logits, temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30], atol=1e-3)
    assert frequencies(logits, top_k=10) == [0.1, 0.4, 0.2, 0.3]


def test_cached_logits_equal_uncached_ones(model):
    ids = np.random.RandomState(0).randint(0, 37, (2, 9)).astype(np.int32)
    whole = model(Tensor(ids)).asnumpy()
    cache = KeyValueCache(9)
    parts = [
        model(Tensor(np.ascontiguousarray(piece)), cache=cache).asnumpy()
        for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:])
    ]
    assert cache.length == 9
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


def test_greedy_is_the_argmax_of_every_prefix(model):
    prompt = [3, 1, 4]
    expected = list(prompt)
    for _ in range(6):
        expected.append(int(model(Tensor(np.array([expected], np.int32))).asnumpy()[0, -1].argmax()))
    assert generate(model, [prompt], 6) == [expected[3:]]


def test_logits_of_the_last_position_only(model):
    ids = Tensor(np.random.RandomState(0).randint(0, 37, (2, 5)).astype(np.int32))
    found, whole = model(ids, last_only=True).asnumpy(), model(ids).asnumpy()
    assert found.shape == (2, 1, 37)
    np.testing.assert_allclose(found, whole[:, -1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spreads", [False, True])
def test_what_a_rank_has_all_of_is_not_copied(spreads):
    """While tokens are made; before and afterwards parameters are gathered, written and trained as ever."""
    world = World(RecordingEngine(SingleEngine()), Mesh(1, 0))
    with use_world(world):
        made = Llama(LlamaConfig(**SIZES, init_std=0.3))
        made = spread(made) if spreads else made
        bms.init_parameters(made)
        ids = Tensor(np.array([[3, 1, 4]], np.int32))
        made(ids)
        assert any(op == "all_gather" for op, _ in world.engine.calls())
        first = generate(made, [[3, 1, 4]], 4)
        world.engine.events.clear()
        assert generate(made, [[3, 1, 4]], 4) == first
        assert world.engine.calls() == [] and context_of(world).pipeline.meter.current == 0
        _, grads = ms.value_and_grad(made.loss, None, made.trainable_params())(ids, ids)
        assert all(grad.asnumpy().any() for grad in grads)
        for p in made.get_parameters():
            p.copy_full(np.zeros(p.full_shape, np.float32))
        assert not made(ids).asnumpy().any() and generate(made, [[3, 1, 4]], 2) == [[0, 0]]


def test_what_several_ranks_have_parts_of_is_gathered():
    world = World(RecordingEngine(SimulatedEngine(0, 2)), Mesh(2, 0))
    with use_world(world):
        made = Llama(LlamaConfig(**SIZES))
        bms.init_parameters(made)
        with unwritten(made), no_grad():
            made(Tensor(np.array([[3, 1, 4]], np.int32)))
    assert {label for op, label in world.engine.calls() if op == "all_gather"} >= {p.name for p in made.get_parameters()}


def test_prompts_of_different_lengths_do_not_disturb_each_other(model):
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    together = generate(model, prompts, 5)
    assert together == [generate(model, [prompt], 5)[0] for prompt in prompts]


def test_sampling_repeats_with_its_seed(model):
    settings = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
    first = generate(model, [[1, 2]], 12, seed=1, **settings)
    assert first == generate(model, [[1, 2]], 12, seed=1, **settings)
    assert first != generate(model, [[1, 2]], 12, seed=2, **settings)


def test_end_token_stops_and_is_kept(model):
    tokens = generate(model, [[3, 1, 4]], 8)[0]
    end = tokens[2]
    stop = tokens.index(end)
    seen = []
    assert generate(model, [[3, 1, 4]], 8, eos_id=end, on_token=lambda t: seen.append(t.tolist())) == [tokens[: stop + 1]]
    assert len(seen) == stop + 1


def test_training_mode_is_restored(model):
    model.set_train(True)
    generate(model, [[1]], 1)
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "every prompt needs at least one token"),
        ([[1], []], {}, "every prompt needs at least one token"),
        ([[1]], {"temperature": -1.0}, "temperature must be at least 0, not -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        ([[1]], {"top_k": -1}, "top_k must be at least 0, which is all, not -1"),
    ],
)
def test_bad_settings(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 2, **settings)


def test_choose_at_the_ends():
    """A draw of almost 1 picks the last token that is allowed, never one that was ruled out; huge logits do not overflow."""
    logits = np.repeat(logits_of(0.1, 0.4, 0.2, 0.3), 2, 0)
    draws = np.array([0.0, np.nextafter(1.0, 0.0)])
    assert choose(logits, draws).tolist() == [1, 0]
    assert choose(logits, draws, top_k=2).tolist() == [1, 3]
    assert choose(logits, draws, top_p=0.8).tolist() == [1, 2]
    far = np.array([[1e30, -1e30, 0.0], [-np.inf, 5.0, -np.inf]], np.float32)
    assert choose(far, draws).tolist() == choose(far, draws, temperature=0.0).tolist() == [0, 1]
    assert choose(far, draws, temperature=1e-3).dtype == np.int32


def test_choose_combines_its_limits():
    """top_p counts what top_k left: 0.4 / 0.9 and 0.3 / 0.9 make more than 0.75."""
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert frequencies(logits, top_k=3, top_p=0.75) == [0, 0.571, 0, 0.429]
    np.testing.assert_allclose(frequencies(logits, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=1e-3)


def test_equal_logits_prefer_the_first():
    assert choose(np.zeros((1, 4)), np.zeros(1), temperature=0.0).tolist() == [0]
    assert frequencies(np.zeros((1, 4)), top_k=2) == [0.5, 0.5, 0, 0]


def test_rows_are_chosen_apart():
    logits = np.concatenate([logits_of(0.9, 0.1), logits_of(0.1, 0.9)])
    assert choose(logits, np.array([0.5, 0.5])).tolist() == [0, 1]
    assert choose(logits, np.array([0.95, 0.5])).tolist() == [1, 1]


def test_end_tokens_stop_each_prompt_by_itself(model):
    """All go on until the last one ends; what a finished prompt draws afterwards is dropped."""
    prompts = [[3, 1, 4], [9], [2, 6]]
    free = generate(model, prompts, 12, temperature=1.0, seed=3)
    end = free[0][4]
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert generate(model, prompts, 12, temperature=1.0, seed=3, eos_id=end) == cut
    assert len({len(row) for row in cut}) > 1


def test_half_models_generate(single_world):
    model = spread(Llama(LlamaConfig(**SIZES, init_std=0.3, dtype="float16")))
    bms.init_parameters(model)
    together = generate(model, [[3, 1, 4], [5]], 4)
    assert [len(row) for row in together] == [4, 4]
    assert generate(model, [[3, 1, 4]], 4) == together[:1]


def test_evaluation_mode_is_kept_and_restored_after_an_error(model):
    model.set_train(False)
    generate(model, [[1]], 1)
    assert not model.training
    model.set_train(True)

    def stop(tokens):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], 3, on_token=stop)
    assert model.training


def test_no_new_tokens(model):
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 1, not 0"):
        generate(model, [[1]], 0)


def generate_everywhere(world):
    model = spread(Llama(LlamaConfig(**SIZES, init_std=0.3)))
    bms.init_parameters(model)
    mine = [[1, 2, 3]] if world.engine.rank == 0 else [[7]]
    return generate(model, [[3, 1, 4]], 6), generate(model, mine, 8, eos_id=5)


def test_ranks_generate_what_one_process_does(run_ranks, model):
    alone = generate(model, [[3, 1, 4]], 6)
    results = run_ranks(2, generate_everywhere)
    assert [r[0] for r in results] == [alone, alone]
    assert [r[1] for r in results] == [generate(model, [[1, 2, 3]], 8, eos_id=5), generate(model, [[7]], 8, eos_id=5)]


@pytest.mark.parametrize(
    "prompts, kind, text",
    [
        ([[1, 37]], ValueError, "prompt 0 has the token 37, and the model ids from 0 to 36: was it made by another tokenizer?"),
        ([[1], [2, -1]], ValueError, "prompt 1 has the token -1, and the model ids from 0 to 36"),
        ([[1 << 40]], ValueError, "prompt 0 has the token 1099511627776"),
        ([np.array([5, 300], np.uint16)], ValueError, "prompt 0 has the token 300"),
        ([[1.5]], TypeError, r"prompts are whole numbers, ids of a tokenizer: prompt 0 has \[1.5\]"),
        ([[True]], TypeError, "prompts are whole numbers"),
        (["a b"], TypeError, "prompts are lists of token ids, one list each: prompt 0 is 'a b'"),
        ([["a"]], TypeError, "prompts are whole numbers"),
        ([1, 2], TypeError, "prompts are lists of token ids, one list each: prompt 0 is 1"),
        ("a b", TypeError, "prompts are lists of token ids"),
        ([[[1]]], TypeError, "prompts are lists of token ids"),
        ([[1], []], ValueError, "every prompt needs at least one token"),
        ([], ValueError, "every prompt needs at least one token"),
    ],
)
def test_prompts_that_cannot_be(model, prompts, kind, text):
    with pytest.raises(kind, match=text) as error:
        generate(model, prompts, 2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_prompts_may_be_arrays_and_tensors(model):
    expected = generate(model, [[3, 1, 4]], 4)
    array = np.array([[3, 1, 4]])
    for prompts in (array, [array[0]], array.astype(np.uint8), [(3, 1, 4)], [Tensor(array[0])]):
        any_of_them: Any = prompts
        assert generate(model, any_of_them, 4) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_computes_nan_writes_nothing(model, value, temperature):
    model.set_train(True)
    weight = next(p for p in model.trainable_params() if "norm" in p.name or "ln" in p.name)
    weight.copy_full(np.full(weight.full_shape, value, np.float32))
    with pytest.raises(FloatingPointError, match="the logits for new token 0 are not finite"):
        generate(model, [[1, 2]], 3, temperature=temperature)
    assert model.training


def test_tokens_may_be_ruled_out_by_minus_infinity(single_world):
    class Mask:
        training = False

        def set_train(self, mode):
            pass

        def __call__(self, ids, padding, cache):
            logits = np.full((*ids.shape, 4), -np.inf, np.float32)
            logits[..., 2] = 0.0
            return Tensor(logits)

    assert generate(Mask(), [[1]], 2) == [[2, 2]]


# Beside transformers #


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "gpt2", "mistral", "qwen3-window"])
def test_tokens_are_those_of_transformers(single_world, case, how):
    """Greedy and beam search; prompts of different lengths at once, which there were alone."""
    right = np.load(FOLDER / "generation.npz")[f"{case}:{how}"]
    found = generate(model_of(case), PROMPTS, NEW_TOKENS, **SEARCHES[how])
    assert found == [[int(t) for t in row if t >= 0] for row in right]


def test_choose_by_a_part_of_the_most_likely():
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert frequencies(logits, min_p=0.6) == [0, 0.571, 0, 0.429]
    assert frequencies(logits, min_p=1.0) == [0, 1, 0, 0]


def test_several_sequences_differ_and_repeat(model):
    how = {"temperature": 1.0, "num_return_sequences": 3}
    found = generate(model, [[1, 2], [3]], 6, **how)
    assert len(found) == 6 and len({tuple(x) for x in found}) > 3
    assert generate(model, [[1, 2], [3]], 6, **how) == found


def test_stop_strings_end_each_text(model):
    greedy = generate(model, [[1, 2, 3], [4, 5]], 8)
    decode = lambda tokens: "".join(chr(65 + t) for t in tokens)  # noqa: E731
    stop = stop_strings(decode, [decode(greedy[0][2:4])])
    found = generate(model, [[1, 2, 3], [4, 5]], 8, stop=stop)
    assert found[0] == greedy[0][:4] and found[1] == greedy[1][: len(found[1])]
    with pytest.raises(ValueError, match="a list of texts that are not empty, not 'x'"):
        stop_strings(decode, "x")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2, "temperature": 1.0}, "leave the temperature at 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 of num_beams=2 cannot be returned"),
        ({"num_return_sequences": 2}, "would be the same each time: set a temperature, or num_beams"),
        ({"min_p": 2.0}, "min_p must be between 0 and 1, not 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, not 0.0"),
        ({"num_beams": 2, "on_token": print}, "on_token has no effect with num_beams"),
    ],
)
def test_settings_without_effect(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[1]], 2, **settings)
