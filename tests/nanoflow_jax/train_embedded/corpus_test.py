"""The corpus is the same list every time, and a file never changes sides."""

import pathlib

import pytest

from nanoflow_jax.train_embedded import corpus
from tests.nanoflow_jax.train_embedded import library


def test_reading_twice_gives_the_same_files_in_name_order(tmp_path: pathlib.Path) -> None:
    library.write(tmp_path)
    files = corpus.read_corpus(tmp_path)
    assert [f.name for f in files] == sorted(f.name for f in files)
    assert len(files) == 24
    assert files == corpus.read_corpus(tmp_path)


def test_tests_tables_and_build_records_are_left_out(tmp_path: pathlib.Path) -> None:
    names = ["a.py", "test/b.py", "x/tests/c.py", "encodings/d.py", "_sysconfigdata__linux.py"]
    for name in [*names, "config-3/e.py", "site-packages/p/f.py", "notes.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    assert [f.name for f in corpus.read_corpus(tmp_path)] == ["a.py"]


def test_digest_moves_with_a_byte_and_with_a_name(tmp_path: pathlib.Path) -> None:
    library.write(tmp_path, num_files=3)
    before = corpus.digest(corpus.read_corpus(tmp_path))
    changed = tmp_path / "package_0" / "module_0.py"
    changed.write_text(changed.read_text() + "#")
    after = corpus.digest(corpus.read_corpus(tmp_path))
    changed.rename(changed.with_name("moved.py"))
    assert len({before, after, corpus.digest(corpus.read_corpus(tmp_path))}) == 3


def test_a_file_stays_on_its_side_when_others_go(tmp_path: pathlib.Path) -> None:
    files = corpus.read_corpus(library.write(tmp_path))
    kept, held_out = corpus.split(files, one_in=4)
    assert {f.name for f in kept} | {f.name for f in held_out} == {f.name for f in files}
    assert not {f.name for f in kept} & {f.name for f in held_out}
    fewer_kept, fewer_held_out = corpus.split(files[::2], one_in=4)
    assert set(fewer_kept) <= set(kept)
    assert set(fewer_held_out) <= set(held_out)


def test_a_folder_without_sources_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has no Python sources to train on"):
        corpus.read_corpus(tmp_path)


def test_a_split_with_an_empty_side_is_refused(tmp_path: pathlib.Path) -> None:
    files = corpus.read_corpus(library.write(tmp_path, num_files=1))
    with pytest.raises(ValueError, match="both need one"):
        corpus.split(files, one_in=2)


def test_the_standard_library_is_found() -> None:
    assert (corpus.standard_library() / "textwrap.py").exists()
