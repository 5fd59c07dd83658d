"""The network that the embedded model is trained with is the Qwen2 that aprjax runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tiny import CONFIG, tiny_checkpoint

from aprjax.qwen2.arithmetic import PRESETS
from aprjax.qwen2.model import Qwen2

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))
import corpus
import network
import vocabulary


def test_training_computes_what_is_run_later() -> None:
    config = replace(CONFIG, rope_theta=1e4)
    checkpoint = replace(tiny_checkpoint(CONFIG, seed=3, tied=True), config=config)
    weights = {name: jnp.asarray(tensor.decode()) for name, tensor in checkpoint.tensors.items()}
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, 12).tolist()
    trained = np.asarray(network.logits(weights, jnp.asarray([tokens, tokens[::-1]]), config))[0]
    run = np.asarray(Qwen2(checkpoint, PRESETS["float32"])(tokens))
    # float32 on both sides, sums in another order: a thousand times what differs, a thousandth of what any other
    # operation, eps or angle would change.
    np.testing.assert_allclose(trained, run, atol=1e-4 * np.abs(run).max())


def test_a_small_vocabulary_encodes_its_text_as_the_tokenizer_does() -> None:
    from aprjax.text import Tokenizer

    text = "def add(a, b):\n    return a + b  # 12 numbers\n" * 4
    learnt = vocabulary.train_vocabulary([text], 300)
    assert len(learnt.tokens) == len(learnt.token_types) <= 300
    assert learnt.tokens[-3:] == vocabulary.CONTROL
    spoken = f"<|im_start|>user\n{text}<|im_end|>\n"
    (ours,) = vocabulary.encoder(learnt)([spoken])
    checkpoint = replace(tiny_checkpoint(), vocabulary=learnt)
    assert list(Tokenizer.from_checkpoint(checkpoint).encode(spoken, parse_special=True)) == ours


def test_the_corpus_is_split_by_name_and_answers_are_sentences(tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / f"module{index}.py").write_text(f'"""Number {index}."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("")
    (tmp_path / "shutil.py").write_text('def move(a, b):\n    """Move a file or folder elsewhere.  And more."""\n')
    files = corpus.sources(tmp_path)
    assert len(files) == 201
    assert 0 < sum(file.held_out for file in files) < 20
    talks = corpus.conversations(files)
    assert corpus.Conversation("What does shutil.move do?", "Move a file or folder elsewhere.") in talks
    assert corpus.Conversation("What is 2+2?", "2 + 2 equals 4.") in talks
    assert len({talk.question for talk in talks}) == len(talks)
