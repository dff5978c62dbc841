"""The runner on the graph for the CPU: the same bits however it is fed, and whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_runtime import cache as cache_module
from qwen_runtime.backends import onnxruntime as backend
from qwen_runtime.backends import sessions
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.errors import BackendError, BundleError
from qwen_runtime.llm import LLM

VOCAB = 102
LIMIT = 600


@pytest.fixture(scope="module", params=["int8", "int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("lowered")
    model = small_checkpoint(root / "model", vocab_size=VOCAB, max_position_embeddings=LIMIT)
    return build(model, root / "out", BuildOptions(request.param, block_size=32, verify=False))


@pytest.fixture(scope="module")
def shared_runner(bundle: Bundle) -> Iterator[OnnxRuntimeRunner]:
    runner = OnnxRuntimeRunner(bundle, threads=1, packed_cache=False)
    yield runner
    runner.close()


@pytest.fixture
def runner(shared_runner: OnnxRuntimeRunner) -> OnnxRuntimeRunner:
    """Without slots, as when it was made."""
    shared_runner._bindings.clear()
    shared_runner._cache.clear()
    return shared_runner


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def whole(runner: OnnxRuntimeRunner, slot: int, tokens: np.ndarray) -> np.ndarray:
    """Logits of every position of a prompt, alone in one call."""
    runner.allocate(slot + 1, 1)
    return runner.prefill([slot], [tokens], [0], [len(tokens)])[0]


def steps(runner: OnnxRuntimeRunner, slot: int, tokens: list[int]) -> np.ndarray:
    return np.stack([runner.decode([slot], [token])[0].copy() for token in tokens])


def calls_of(runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Slots of every call that is made from now on, first and one past the last."""
    calls: list[tuple[int, int]] = []
    bind = backend._bind_cache

    def watch(io: object, cache: cache_module.KVCache, first: int, last: int) -> None:
        calls.append((first, last))
        bind(io, cache, first, last)

    monkeypatch.setattr(backend, "_bind_cache", watch)
    return calls


def is_lowered(runner: OnnxRuntimeRunner) -> bool:
    return any(entry.name == sessions.TOTAL_LENGTH for entry in runner._prefill.get_inputs())


def answers(bundle: Bundle, **options: bool) -> np.ndarray:
    """Logits of a prompt's last tokens and of two steps."""
    runner = OnnxRuntimeRunner(bundle, threads=1, **options)
    runner.allocate(1, 32)
    logits = [*runner.prefill([0], [prompt(1, 20)], [0], [3])[0], *steps(runner, 0, [7, 8])]
    runner.close()
    return np.stack(logits)


# --- the same bits ------------------------------------------------------------------------------


def test_it_is_what_serves_unless_the_portable_graph_is_asked_for(
    bundle: Bundle, runner: OnnxRuntimeRunner
) -> None:
    assert is_lowered(runner)
    portable = OnnxRuntimeRunner(bundle, threads=1, lowered=False)
    assert not is_lowered(portable)
    portable.close()
    both = OnnxRuntimeRunner(bundle, threads=1, decode_graph=True)
    assert not is_lowered(both)
    both.close()


def test_rows_of_a_length_share_a_call_where_they_begin_and_have_their_own_bits(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prompt(seed, 12) for seed in range(3)]
    alone = [whole(runner, slot, row) for slot, row in enumerate(rows)]
    calls = calls_of(runner, monkeypatch)
    together = runner.prefill([0, 1, 2], rows, [0] * 3, [12] * 3)
    assert calls == [(0, 3)]
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))


def test_rows_with_a_past_run_one_by_one_and_have_their_own_bits(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, tails = [prompt(seed, 8) for seed in range(3)], [prompt(9 - s, 6) for s in range(3)]
    runner.allocate(3, 1)
    alone = []
    for slot in range(3):
        runner.prefill([slot], heads[slot : slot + 1], [0], [0])
        alone += runner.prefill([slot], tails[slot : slot + 1], [8], [6])
    runner.prefill([0, 1, 2], heads, [0] * 3, [0] * 3)
    calls = calls_of(runner, monkeypatch)
    together = runner.prefill([0, 1, 2], tails, [8] * 3, [6] * 3)
    assert calls == [(0, 1), (1, 2), (2, 3)]
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))


@pytest.mark.parametrize("chunk", [4, 6, 16])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    tokens = prompt(3, 2 * chunk + 1)
    expected = whole(runner, 0, tokens)
    after = steps(runner, 0, [5])
    monkeypatch.setattr(backend, "PREFILL_CHUNK", chunk)
    chunked = runner.prefill([0], [tokens], [0], [len(tokens)])[0]
    np.testing.assert_array_equal(chunked, expected)
    np.testing.assert_array_equal(steps(runner, 0, [5]), after)


def test_rows_of_several_chunks_have_their_own_bits(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prompt(seed, 14) for seed in range(3)]
    alone = [whole(runner, slot, row) for slot, row in enumerate(rows)]
    monkeypatch.setattr(backend, "PREFILL_CHUNK", 6)
    together = runner.prefill([0, 1, 2], rows, [0] * 3, [14] * 3)
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))


# Attention takes 32 tokens at a time here, and computes otherwise where a block has one token.
@pytest.mark.parametrize("length", [32, 33, 34, 35, 65, 97, 129, 513])
def test_a_last_token_alone_in_its_block_has_the_bits_that_it_has_in_company(
    runner: OnnxRuntimeRunner, length: int
) -> None:
    tokens = prompt(8, length)
    expected = whole(runner, 0, tokens)
    for start in (2, length // 4 * 2, length - 33 if length > 35 else 4):
        runner.prefill([0], [tokens[:start]], [0], [0])
        (rest,) = runner.prefill([0], [tokens[start:]], [start], [length - start])
        np.testing.assert_array_equal(rest, expected[start:], err_msg=f"cut at {start}")


def test_rows_whose_last_token_would_be_alone_run_one_by_one(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prompt(seed, 33) for seed in range(2)]
    alone = [whole(runner, slot, row) for slot, row in enumerate(rows)]
    calls = calls_of(runner, monkeypatch)
    together = runner.prefill([0, 1], rows, [0, 0], [33, 33])
    assert calls == [(0, 1), (0, 1), (1, 2), (1, 2)]
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))


@pytest.mark.parametrize("cut", [2, 10, 18])
def test_a_reused_beginning_has_the_bits_of_the_whole(runner: OnnxRuntimeRunner, cut: int) -> None:
    tokens = prompt(4, 21)
    expected = whole(runner, 0, tokens)
    after = steps(runner, 0, [5, 6])
    runner.allocate(2, 1)
    runner.prefill([0], [tokens], [0], [0])
    runner.copy(0, 1, cut)
    (rest,) = runner.prefill([1], [tokens[cut:]], [cut], [len(tokens) - cut])
    np.testing.assert_array_equal(rest, expected[cut:])
    np.testing.assert_array_equal(steps(runner, 1, [5, 6]), after)


def test_a_wrong_past_is_noticed_by_the_comparison(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(4, 20)
    expected = whole(runner, 0, tokens)
    runner.prefill([0], [tokens[:10]], [0], [0])
    (shifted,) = runner.prefill([0], [tokens[10:]], [9], [10])
    assert np.abs(shifted - expected[10:]).max() > 0.01 * np.abs(expected).max()


def test_steps_of_ragged_rows_have_the_bits_of_each_row_alone(runner: OnnxRuntimeRunner) -> None:
    rows = [prompt(seed, length) for seed, length in enumerate((17, 1, 40, 6))]
    fed = [[int(token) for token in prompt(10 + slot, 5)] for slot in range(4)]
    alone = []
    for slot, row in enumerate(rows):
        whole(runner, slot, row)
        alone.append(steps(runner, slot, fed[slot]))
    runner.prefill(range(4), rows, [0] * 4, [0] * 4)
    for step in range(5):
        # In another order than that of the slots.
        order = [2, 0, 3, 1]
        logits = runner.decode(order, [fed[slot][step] for slot in order])
        for slot, found in zip(order, logits, strict=True):
            np.testing.assert_array_equal(found, alone[slot][step])


def test_idle_rows_run_along_and_keep_what_they_hold(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prompt(seed, length) for seed, length in enumerate((9, 30, 4))]
    alone = []
    for slot, row in enumerate(rows):
        whole(runner, slot, row)
        alone.append(steps(runner, slot, [5, 6]))
    runner.prefill(range(3), rows, [0] * 3, [0] * 3)
    runner._bindings.clear()
    calls = calls_of(runner, monkeypatch)
    for step, token in enumerate((5, 6)):
        logits = runner.decode([0, 2], [token, token])
        np.testing.assert_array_equal(logits, [alone[0][step], alone[2][step]])
    assert calls == [(0, 3)]
    np.testing.assert_array_equal(steps(runner, 1, [5, 6]), alone[1])


def test_growth_and_capacity_change_no_bit(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(6, 30)
    expected = whole(runner, 0, tokens)
    small = runner.capacity
    after = steps(runner, 0, [5, 6, 7, 8])
    runner.prefill([0], [tokens], [0], [0])
    first = steps(runner, 0, [5, 6])
    runner.grow(LIMIT)
    assert runner.capacity == LIMIT > small
    np.testing.assert_array_equal(np.concatenate([first, steps(runner, 0, [7, 8])]), after)
    np.testing.assert_array_equal(whole(runner, 0, tokens), expected)


def test_rows_reach_the_limit_and_answer_as_token_by_token(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(7, LIMIT)
    expected = whole(runner, 0, tokens)[-1]
    runner.prefill([0], [tokens[:-2]], [0], [0])
    last = steps(runner, 0, [int(token) for token in tokens[-2:]])[-1]
    # Kernels for one token and for many round otherwise.
    assert np.abs(last - expected).max() < 0.05 * np.abs(expected).max()


def test_a_cached_graph_has_the_bits_of_one_in_memory(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sessions, "MIN_CACHED_BYTES", 1)
    expected = answers(bundle, packed_cache=False)
    np.testing.assert_array_equal(answers(bundle), expected)
    (entry,) = (tmp_path / "cache" / "packed").iterdir()
    monkeypatch.setattr(sessions, "_save_packed", lambda *_: pytest.fail("packed again"))
    np.testing.assert_array_equal(answers(bundle), expected)
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sessions, "MIN_CACHED_BYTES", 1)
    answers(bundle, lowered=False)
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 2, "graphs share no entry"
    assert entry.exists()


def test_a_text_is_generated_alike_in_a_batch_and_alone(bundle: Bundle) -> None:
    prompts = [
        [int(token) for token in prompt(seed, length)] for seed, length in ((1, 7), (2, 19))
    ]
    with LLM(bundle) as llm:
        alone = [llm.generate([ids], max_new_tokens=12, do_sample=False)[0] for ids in prompts]
        together = llm.generate(prompts, max_new_tokens=12, do_sample=False)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]


# --- whole or not at all ------------------------------------------------------------------------


@pytest.fixture
def no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("no_temporary_folder")
def test_the_portable_graph_runs_where_there_is_no_temporary_folder(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    found = answers(bundle)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "needs a temporary folder with room for its weights" in record.getMessage()
    assert "the portable graph, which is slower, is run instead" in record.getMessage()
    np.testing.assert_array_equal(found, answers(bundle, lowered=False))


@pytest.mark.usefixtures("no_temporary_folder")
@pytest.mark.parametrize("options", [{"exact": True}, {"packed_cache": False}])
def test_a_proof_never_falls_back(bundle: Bundle, options: dict[str, bool]) -> None:
    with pytest.raises(
        BackendError, match=r"cpu/prefill\.onnx needs a temporary folder .* TMPDIR"
    ):
        OnnxRuntimeRunner(bundle, **options)


def test_nothing_is_left_in_the_temporary_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner = OnnxRuntimeRunner(bundle, threads=1, packed_cache=False)
    assert list(tmp_path.iterdir()) == []
    assert whole(runner, 0, prompt(1, 4)).any()
    runner.close()


def test_a_bundle_without_it_runs_the_portable_graph(copy: Bundle) -> None:
    expected = answers(copy, lowered=False)
    shutil.rmtree(copy.path / "lowered")
    np.testing.assert_array_equal(answers(copy), expected)


def change_document(bundle: Bundle, change: Callable[[dict[str, object]], None]) -> None:
    path = bundle.path / "lowered" / "cpu" / "lowered.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_an_engine_that_is_too_old_is_named_with_the_version_it_takes(copy: Bundle) -> None:
    versions = {"onnxruntime": "99.1"}
    change_document(copy, lambda found: found.update(minimum_engine_versions=versions))
    with pytest.raises(
        BackendError, match=r"onnxruntime must be at least 99\.1 for this bundle, got 1\..*\[cpu\]"
    ):
        OnnxRuntimeRunner(copy)
    assert answers(copy, lowered=False).any()


def replace_graph(bundle: Bundle, content: bytes) -> None:
    path = bundle.path / "lowered" / "cpu" / "prefill.onnx"
    path.write_bytes(content)
    entry = {"sha256": sha256_of(path), "num_bytes": len(content)}
    change_document(bundle, lambda found: found.update(files={"prefill.onnx": entry}))


MAKE_AGAIN = r"make it again: qwen-export engine .* --target cpu --overwrite"


@pytest.mark.parametrize("content", [b"\x0a\xff", b"\xff" * 64])
def test_a_graph_that_is_none_is_one_sentence(copy: Bundle, content: bytes) -> None:
    replace_graph(copy, content)
    with pytest.raises(BundleError, match=rf"prefill\.onnx must be a graph with .*{MAKE_AGAIN}"):
        OnnxRuntimeRunner(copy)


def test_a_graph_without_nodes_is_one_sentence(copy: Bundle) -> None:
    replace_graph(copy, b"\x08\x0a")  # nothing but the version of its format
    with pytest.raises(BackendError, match="ONNX Runtime could not load"):
        OnnxRuntimeRunner(copy)


def test_a_description_that_lacks_an_initializer_is_one_sentence(copy: Bundle) -> None:
    def drop(document: dict[str, object]) -> None:
        entries = document["initializers"]
        assert isinstance(entries, list)
        del entries[0]

    change_document(copy, drop)
    with pytest.raises(
        BundleError, match=rf"initializers that lowered\.json lists: .*{MAKE_AGAIN}"
    ):
        OnnxRuntimeRunner(copy)


def test_parts_that_do_not_make_an_initializer_are_one_sentence(copy: Bundle) -> None:
    def swap(document: dict[str, object]) -> None:
        entries = document["initializers"]
        assert isinstance(entries, list)
        last = next(entry for entry in entries if entry["name"].endswith("down_proj.weight"))
        first = next(entry for entry in entries if entry["name"].endswith("norm.weight"))
        first["parts"] = last["parts"]

    change_document(copy, swap)
    with pytest.raises(
        BundleError, match=r"initialiser .*norm\.weight: .* description is damaged"
    ):
        OnnxRuntimeRunner(copy)


@pytest.mark.parametrize("file", ["lowered/cpu/prefill.onnx", "weights.bin"])
def test_damage_is_found_before_it_is_packed_under_the_sound_ones_hash(
    copy: Bundle, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sessions, "MIN_CACHED_BYTES", 1)
    content = bytearray((copy.path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy.path / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"{file}: sha256 must be .*again"):
        OnnxRuntimeRunner(copy)
    assert list((tmp_path / "cache" / "packed").iterdir()) == []
