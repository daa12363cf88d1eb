"""Reading texts: Penn Treebank in its layouts, any other file, what is wrong."""

import gzip

import numpy as np
import pytest

from benchmarks.data import DataError
from benchmarks.data.streams import cut
from benchmarks.data.text_files import PTB_NAMES, load_text
from benchmarks.suites import ptb

TRAIN = "the cat sat\nthe dog sat\n"


def write(path, text, compressed=False):
  path.parent.mkdir(parents=True, exist_ok=True)
  content = text.encode()
  path.write_bytes(gzip.compress(content) if compressed else content)
  return path


def write_ptb(folder, texts=(TRAIN, "the cat\n", "a dog sat\n"), compressed=()):
  for name, text in zip(PTB_NAMES, texts, strict=True):
    is_compressed = name in compressed
    write(folder / (name + ".gz" * is_compressed), text, is_compressed)


def decoded(text, part, joint=""):
  return joint.join(text.vocabulary[number] for number in part)


@pytest.mark.parametrize("compressed", [(), PTB_NAMES, PTB_NAMES[:1]])
@pytest.mark.parametrize("folder", [".", "ptb", "simple-examples/data"])
def test_ptb_is_found_in_any_layout(tmp_path, folder, compressed):
  write_ptb(tmp_path / folder, compressed=compressed)
  text = load_text("characters", tmp_path)
  assert text.name == "ptb"
  assert decoded(text, text.train) == TRAIN
  assert decoded(text, text.validation) == "the cat\n"
  assert decoded(text, text.test) == "a dog sat\n"


def test_words_end_lines_with_a_symbol_of_their_own(tmp_path):
  write_ptb(tmp_path, (TRAIN, " the  cat \n", "dog\nsat"))
  text = load_text("words", tmp_path)
  assert decoded(text, text.train, " ") == "the cat sat <eos> the dog sat <eos>"
  assert decoded(text, text.validation, " ") == "the cat <eos>"
  assert decoded(text, text.test, " ") == "dog <eos> sat"


def test_vocabulary_is_the_training_texts_by_frequency(tmp_path):
  write_ptb(tmp_path, ("b a b c b a\n", "a b c\n", "a b c\n"))
  text = load_text("words", tmp_path)
  assert text.vocabulary == ("b", "a", "<eos>", "c")
  assert text.train.dtype == np.int32


def test_one_file_is_divided_in_order(tmp_path):
  path = write(tmp_path / "my.own.txt", "abcde" * 20)
  text = load_text("characters", files=[path])
  assert text.name == "my"
  assert [len(part) for part in (text.train, text.validation, text.test)] == [
    80,
    10,
    10,
  ]
  parts = (decoded(text, p) for p in (text.train, text.validation, text.test))
  assert "".join(parts) == "abcde" * 20


def test_unknown_words_become_unk_where_the_training_text_has_it(tmp_path):
  write_ptb(tmp_path, ("the <unk> sat\n", "the bird sat\n", "the the\n"))
  text = load_text("words", tmp_path)
  assert decoded(text, text.validation, " ") == "the <unk> sat <eos>"


@pytest.mark.parametrize(
  ("level", "texts", "message"),
  [
    ("characters", (TRAIN, "the cäb\n", TRAIN), r"valid\.txt: 'ä', number 5 of its"),
    (
      "words",
      (TRAIN, TRAIN, "the bird\n"),
      r"test\.txt: 'bird', number 1 of its words",
    ),
    ("characters", (TRAIN, "", TRAIN), r"valid\.txt: empty"),
    ("characters", (" \n\n", TRAIN, TRAIN), r"train\.txt: empty"),
    ("words", ("one\n", "one", "one\n"), r"valid\.txt: too short, 1 words to validate"),
  ],
)
def test_texts_that_do_not_fit_are_named(tmp_path, level, texts, message):
  write_ptb(tmp_path, texts)
  with pytest.raises(DataError, match=message):
    load_text(level, tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(DataError, match=r"no Penn Treebank below .*nowhere.*no such"):
    load_text("words", tmp_path / "nowhere")
  write(tmp_path / PTB_NAMES[0], TRAIN)
  with pytest.raises(DataError, match=r"but no ptb\.valid\.txt and no ptb\.test\.txt"):
    load_text("words", tmp_path)
  with pytest.raises(DataError, match=r"my\.txt: cannot be read \(No such file"):
    load_text("words", files=[tmp_path / "my.txt"])
  with pytest.raises(DataError, match="one file, or three .* got 2"):
    load_text("words", files=[tmp_path / PTB_NAMES[0]] * 2)


def test_damaged_files_are_named(tmp_path):
  whole = gzip.compress(TRAIN.encode() * 100)
  path = tmp_path / "my.txt.gz"
  for content, message in (
    (whole[: len(whole) // 2], "damaged"),
    (whole[:20] + b"\0" * 20 + whole[40:], "damaged"),
    ("größer".encode("latin-1"), "not UTF-8, at byte 2"),
  ):
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"my\.txt\.gz: {message}"):
      load_text("characters", files=[path])


@pytest.mark.parametrize("count", [2, 5, 41, 120, 121, 122])
def test_padded_streams_hold_every_target_once(count):
  symbols = np.arange(count)
  streams = cut(symbols, batch_size=4, length=5, pad=True)
  inputs, targets = streams.symbols[:, :-1], streams.symbols[:, 1:]
  assert inputs.shape == streams.valid.shape
  assert inputs.shape[1] % 5 == 0
  np.testing.assert_array_equal(np.sort(targets[streams.valid]), symbols[1:])
  np.testing.assert_array_equal(targets[streams.valid], inputs[streams.valid] + 1)


@pytest.mark.data
def test_penn_treebank_is_mikolovs(ptb_dir):
  text = load_text("characters", ptb_dir)
  parts = (text.train, text.validation, text.test)
  assert [len(part) for part in parts] == [5_101_618, 399_782, 449_945]
  assert len(text.vocabulary) == 50
  text = load_text("words", ptb_dir)
  parts = (text.train, text.validation, text.test)
  assert [len(part) for part in parts] == [929_589, 73_760, 82_430]
  assert len(text.vocabulary) == 10_000


@pytest.mark.data
def test_reports_say_what_frequencies_alone_cost(ptb_dir):
  for level, size, said in (
    ("characters", None, "4.32 bits a character"),
    ("words", 20_000, "9.29 a word"),
  ):
    text = load_text(level, ptb_dir)
    counts = 1 + np.bincount(text.train, minlength=len(text.vocabulary))
    bits = -np.log2(counts / counts.sum())[text.test[:size]].mean()
    assert f"{bits:.2f}" == said.split()[0]
    assert said in ptb.KIND.note
