"""Who stayed away is named, and nobody else."""

import threading

from distgrow.distributed.hang_watch import verdict, whereabouts


def test_a_rank_that_does_not_answer_has_ended() -> None:
    assert verdict({0: "waits", 2: "waits"}, 3) == "rank 1 has ended, or cannot be reached"
    assert verdict({2: "waits"}, 4) == "ranks 0, 1, 3 have ended, or cannot be reached"


def test_a_rank_that_answers_from_elsewhere_stayed_away_and_says_where_it_is() -> None:
    told = verdict({0: "waits", 1: "loss.py:12, in loss", 2: "waits"}, 3)
    assert told == "rank 1 stayed away: it is at loss.py:12, in loss"


def test_ranks_that_all_wait_blame_nobody() -> None:
    assert verdict({0: "waits", 1: "waits"}, 2) == "all ranks live and wait: the network between them has failed"


def test_a_thread_is_found_where_it_is() -> None:
    begun, over = threading.Event(), threading.Event()

    def linger() -> None:
        begun.set()
        while not over.is_set():
            pass

    thread = threading.Thread(target=linger)
    thread.start()
    begun.wait()
    found = whereabouts(thread.ident or 0)
    over.set()
    thread.join()
    assert found.startswith(("test_hang_watch.py:", "threading.py:"))
    assert whereabouts(thread.ident or 0) == "nowhere"
