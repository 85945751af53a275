"""Processes that share a model, played by threads; `generate`'s tests have real ones."""

import concurrent.futures
import contextlib
import re
import socket
import threading

import process_runs
import pytest

from nanoflow_jax import console
from nanoflow_jax.config import ProcessesSection
from nanoflow_jax.parallel import peers

_QUICK = peers.Timing(join_s=20.0, beat_s=0.05, silence_s=5.0)
_ABOUT = {"jax": "1", "--dtype": "auto"}


class _Left:
    """Takes note of the message with which a process would have ended."""

    def __init__(self):
        self.messages = []
        self.happened = threading.Event()

    def __call__(self, message):
        self.messages.append(message)
        self.happened.set()

    def message(self):
        assert self.happened.wait(process_runs.LIMIT_S)
        (message,) = self.messages
        return message


def _section(address, process_id, count):
    return ProcessesSection(coordinator=address, num_processes=count, process_id=process_id)


def _join(address, process_id, count, *, about=_ABOUT, timing=_QUICK, left=None, said=None):
    return peers.join(
        _section(address, process_id, count),
        about,
        say=[].append if said is None else said.append,
        timing=timing,
        leave=left or _Left(),
    )


@contextlib.contextmanager
def _groups(count, timings=None):
    """Groups of all processes and how each of them left."""
    address, left = process_runs.free_address(), [_Left() for _ in range(count)]
    timings = timings or [_QUICK] * count
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        made = [
            pool.submit(_join, address, i, count, timing=timings[i], left=left[i])
            for i in range(count)
        ]
        groups = [future.result() for future in made]
    try:
        yield groups, left
    finally:
        for group in groups:
            group.close()


def test_what_process_0_says_is_heard_by_all_others_in_order():
    with _groups(3) as (groups, left):
        for i in range(20):
            groups[0].say(b"%d" % i * 5000)
        for group in groups[1:]:
            assert [group.hear() for _ in range(20)] == [b"%d" % i * 5000 for i in range(20)]
        assert [group.is_lead for group in groups] == [True, False, False]
        assert len({group.port for group in groups}) == 1
        assert not any(one.messages for one in left)


def test_all_processes_get_the_least_of_their_numbers():
    with _groups(3) as (groups, _), concurrent.futures.ThreadPoolExecutor(3) as pool:
        for values in ((7, 3, 5), (1, 3, 5), (9, 9, 8)):
            found = pool.map(lambda group, value: group.least(value), groups, values)
            assert set(found) == {min(values)}


def test_a_process_that_leaves_before_a_number_is_agreed_on_is_an_error():
    with _groups(2) as (groups, _), concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(groups[0].least, 3)
        parted = threading.Thread(target=groups[1].part)
        parted.start()
        with pytest.raises(console.RunError, match="a process left while its answer was waited"):
            asked.result()
        groups[0].part()
        parted.join()


def test_after_farewells_no_end_is_a_failure():
    with _groups(3) as (groups, left):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda group: group.part(), groups))
        assert groups[1].hear() is None
        for group in reversed(groups):
            group.close()
        assert not any(one.messages for one in left)


@pytest.mark.parametrize("gone", [0, 2])
def test_f14_the_end_of_a_process_ends_all_others_and_all_say_which_it_was(gone):
    with _groups(3) as (groups, left):
        groups[gone].close()
        for i in {0, 1, 2} - {gone}:
            message = left[i].message()
            assert message.startswith(f"process {gone} has ended; all 3 processes end"), message
        assert left[gone].messages == []


def test_f14_a_process_that_is_not_heard_of_for_too_long_counts_as_gone():
    mute = peers.Timing(join_s=20.0, beat_s=60.0, silence_s=60.0)
    soon = peers.Timing(join_s=20.0, beat_s=0.05, silence_s=0.5)
    with _groups(2, [soon, mute]) as (_, left):
        assert left[0].message().startswith("nothing was heard of process 1 for 0.5 s; all 2")


def test_signs_of_life_keep_a_silent_group_together():
    timing = peers.Timing(join_s=20.0, beat_s=0.05, silence_s=4.0)
    with _groups(2, [timing] * 2) as (_, left):
        assert not left[0].happened.wait(5.0)  # longer than silence is allowed to be
        assert not left[1].happened.is_set()


def test_an_error_of_one_process_is_the_message_of_all_others():
    with _groups(3) as (groups, left):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peers, "_GRACE_S", 0.2)
            groups[1].fail("no such folder")
        groups[1].close()
        for i in (0, 2):
            assert left[i].message().startswith("process 1 failed: no such folder; all 3 process")
        assert left[1].messages == []


def test_an_error_that_the_end_of_another_process_caused_is_told_as_that():
    with _groups(2) as (groups, left):
        groups[0].close()
        groups[1].fail("Gloo: connection closed by peer")
        assert left[1].message().startswith("process 0 has ended; all 2 processes end")


def test_what_is_no_message_ends_the_process():
    with _groups(2) as (groups, left):
        groups[1]._peers[0]._sock.sendall(b"\x01\x00\x00\x00\xff")
        assert left[0].message().startswith("the connection to process 1 broke (")


def _refusal(count, *, process_id=1, about=_ABOUT):
    """What a process is told that process 0 of two does not take."""
    address, said = process_runs.free_address(), []
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        lead = pool.submit(_join, address, 0, 2, said=said)
        with pytest.raises(ValueError, match=r".") as refused:
            _join(address, process_id, count, about=about)
        for future in (lead, pool.submit(_join, address, 1, 2)):
            future.result().close()
    assert said[1] == f"refused a process: {refused.value}"
    return str(refused.value)


def test_a_process_of_another_group_is_refused_and_the_others_are_waited_for():
    message = "process 2 has --num_processes=3 and process 0 has 2; start all with the same"
    assert _refusal(3, process_id=2) == message


def test_a_process_with_other_flags_or_another_jax_is_refused():
    assert _refusal(2, about={"jax": "2", "--dtype": "bfloat16"}) == (
        "process 1 differs from process 0: --dtype is 'bfloat16' and not 'auto', jax is '2' and "
        "not '1'; start all alike"
    )


def test_a_second_process_of_a_number_is_refused():
    address, said = process_runs.free_address(), []
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        lead = pool.submit(_join, address, 0, 3, said=said)
        both = [pool.submit(_join, address, 1, 3) for _ in range(2)]
        done, _ = concurrent.futures.wait(both, return_when=concurrent.futures.FIRST_COMPLETED)
        (first,) = done
        message = "there is a process 1 already; give each process a --process_id of its own"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            first.result()
        last = pool.submit(_join, address, 2, 3)
        for future in (lead, last, *(one for one in both if one is not first)):
            future.result().close()


def test_strangers_at_the_door_are_ignored():
    address = process_runs.free_address()
    host, port = address.split(":")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lead = pool.submit(_join, address, 0, 2)
        for data in (b"", b"\x02\x00\x00\x00ab", peers._CODEC.frame(peers.Beat())):
            with _connected(host, int(port)) as stranger:
                stranger.sendall(data)
        other = pool.submit(_join, address, 1, 2)
        for future in (lead, other):
            future.result().close()


def _connected(host, port):
    found = []

    def is_there():
        with contextlib.suppress(ConnectionRefusedError):
            found.append(socket.create_connection((host, port)))
        return bool(found)

    process_runs.wait_until(is_there, tell=lambda: "process 0 does not listen")
    return found[0]


_SOON = peers.Timing(join_s=0.3, beat_s=0.05, silence_s=5.0)


def test_processes_that_do_not_come_are_named_and_those_that_came_are_told():
    address = process_runs.free_address()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = peers.Timing(join_s=5.0)
        lead = pool.submit(_join, address, 0, 3, timing=late)
        with pytest.raises(ValueError, match=r"^processes \[2\] did not come; see process 0$"):
            _join(address, 1, 3)
        message = (
            f"of --num_processes=3 these did not come within 5 s: [2]; start each with "
            f"--process_id and the same --coordinator={address}"
        )
        with pytest.raises(console.RunError, match=f"^{re.escape(message)}$"):
            lead.result()


def test_a_lead_that_is_not_there_is_an_error_that_says_where_it_should_be():
    address = process_runs.free_address()
    start = f"process 0 could not be reached at --coordinator={address} within 0.3 s ("
    with pytest.raises(console.RunError, match=f"^{re.escape(start)}"):
        _join(address, 1, 2, timing=_SOON)


def test_a_lead_that_ends_while_others_wait_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_join, address, 1, 2)
            listener.accept()[0].close()
            with pytest.raises(
                console.RunError, match="process 0 ended before all processes had come"
            ):
                waiting.result()


def test_an_address_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        message = (
            rf"--coordinator={address}: process 0 cannot listen there \(Address already in use"
            r".*\); name an address of its machine and a free port"
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            _join(address, 0, 2)
