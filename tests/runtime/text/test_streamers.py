import queue
import threading

import numpy as np
import pytest

from qwen_runtime.errors import RequestError
from qwen_runtime.text import TextIteratorStreamer, TextStreamer


class Recorder(TextStreamer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append([text, stream_end])


def _feed(streamer, case):
    streamer.put(np.array([case["prompt"]], dtype=np.int64))
    for token_id in case["generated"]:
        streamer.put(np.array([token_id], dtype=np.int64))
    streamer.end()


def test_pieces_equal_the_recorded_streams(tokenizer, golden):
    cases = golden["text"]["stream"]
    assert len(cases) == 33
    for case in cases:
        streamer = Recorder(tokenizer, **case["kwargs"])
        _feed(streamer, case)
        assert streamer.pieces == case["pieces"]


def test_iterator_yields_the_recorded_pieces_empty_ones_too(tokenizer, golden):
    for case in golden["text"]["stream"]:
        streamer = TextIteratorStreamer(tokenizer, timeout=5, **case["kwargs"])
        thread = threading.Thread(target=_feed, args=(streamer, case))
        thread.start()
        assert list(streamer) == [text for text, _ in case["pieces"]]
        thread.join()


def test_pieces_equal_transformers_for_several_tokens_at_once(tokenizer, reference_tokenizer):
    import torch
    import transformers

    class Reference(transformers.TextStreamer):
        pieces: list

        def on_finalized_text(self, text, stream_end=False):
            self.pieces.append([text, stream_end])

    rng = np.random.default_rng(7)
    for _ in range(60):
        reference = Reference(reference_tokenizer, skip_prompt=True, skip_special_tokens=True)
        reference.pieces = []
        ours = Recorder(tokenizer, skip_prompt=True, skip_special_tokens=True)
        for size in (3, *rng.integers(1, 4, size=12)):
            ids = rng.integers(0, 289, size=int(size))
            reference.put(torch.from_numpy(ids))
            ours.put(ids)
        reference.end()
        ours.end()
        assert ours.pieces == reference.pieces


def test_text_streamer_prints_and_ends_the_line(tokenizer, capsys):
    streamer = TextStreamer(tokenizer)
    streamer.put(np.array([259, 273, 274]))
    assert capsys.readouterr().out == "hello "
    streamer.end()
    assert capsys.readouterr().out == "world\n"


def test_a_streamer_serves_the_next_generation_after_end(tokenizer):
    streamer = Recorder(tokenizer, skip_prompt=True)
    for _ in range(2):
        streamer.put(np.array([259]))
        streamer.put(np.array([273]))
        streamer.end()
    assert [text for text, _ in streamer.pieces] == [" ", "wor"] * 2


def test_two_rows_are_refused(tokenizer):
    with pytest.raises(RequestError, match="only supports batch size 1, got 2 rows"):
        TextStreamer(tokenizer).put(np.zeros((2, 1), dtype=np.int64))


def test_iterator_gives_up_after_its_timeout(tokenizer):
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))
