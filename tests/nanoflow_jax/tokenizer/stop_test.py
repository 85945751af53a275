import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.tokenizer.stop import StopMatcher

_STOPS = st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4)


def _run(pieces: list[str], stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stop, include)
    out = ""
    for piece in pieces:
        text, hit = matcher.push(piece)
        out += text
        if hit is not None:
            break
    else:
        return out + matcher.finish(), None
    return out, hit


def _plain(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Looks at every beginning of the text, shortest first."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


@hypothesis.given(pieces=st.lists(st.text("ab.", max_size=4)), stop=_STOPS, include=st.booleans())
@hypothesis.settings(max_examples=150)
def test_pieces_end_where_the_whole_text_ends(pieces, stop, include):
    whole = _plain("".join(pieces), tuple(stop), include)
    assert _run(pieces, tuple(stop), include) == whole


@hypothesis.given(pieces=st.lists(st.text("ab.", max_size=4)), stop=st.text("ab.", min_size=1))
@hypothesis.settings(max_examples=150)
def test_one_stop_string_cuts_where_find_finds_it(pieces, stop):
    text = "".join(pieces)
    assert _run(pieces, (stop,), False)[0] == text.partition(stop)[0]


@hypothesis.given(pieces=st.lists(st.text("ab.", max_size=4)), stop=_STOPS)
@hypothesis.settings(max_examples=150)
def test_no_more_is_held_than_may_begin_a_stop_string(pieces, stop):
    matcher = StopMatcher(tuple(stop))
    seen = shown = ""
    for piece in pieces:
        seen += piece
        text, hit = matcher.push(piece)
        shown += text
        if hit is not None:
            return
        held = seen.removeprefix(shown)
        starts = [seen[i:] for i in range(len(seen)) if any(s.startswith(seen[i:]) for s in stop)]
        assert held == max(starts, key=len, default="")


def test_a_stop_string_across_three_pieces_never_shows():
    matcher = StopMatcher(("\n\nUser:",))
    assert matcher.push("Hi.\n") == ("Hi.", None)
    assert matcher.push("\nUs") == ("", None)
    assert matcher.push("er: what") == ("", "\n\nUser:")


def test_a_false_start_is_given_back():
    matcher = StopMatcher(("aab",))
    assert matcher.push("xaa") == ("x", None)
    assert matcher.push("a") == ("a", None)
    assert matcher.push("c") == ("aac", None)
    assert matcher.finish() == ""


def test_held_text_comes_at_the_end():
    matcher = StopMatcher(("END",))
    assert matcher.push("the EN") == ("the ", None)
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


def test_the_first_string_to_be_complete_ends_the_text():
    assert StopMatcher(("abcd", "bc")).push("xabcd") == ("xa", "bc")
    # Whatever the pieces: no waiting for what might still become longer.
    assert _run(list("xabcd"), ("abcd", "bc"), False) == ("xa", "bc")


def test_of_strings_complete_at_the_same_character_the_longest_counts():
    assert StopMatcher(("c", "abc", "bc")).push("xabc") == ("x", "abc")


def test_included_stop_strings_stay_and_nothing_after_them():
    assert StopMatcher((".",), include_in_output=True).push("One. Two.") == ("One.", ".")


def test_text_after_the_end_is_dropped():
    matcher = StopMatcher(("!",))
    assert matcher.push("a!b") == ("a", "!")
    assert matcher.push("c!") == ("", "!")
    assert matcher.finish() == ""


def test_without_stop_strings_all_text_passes():
    matcher = StopMatcher(())
    assert matcher.push("anything") == ("anything", None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="holds an empty string; leave it out"):
        StopMatcher(("a", ""))
