"""Lookups and commits wait for each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from model_runner.lookup_lock import LookupLock


def test_a_commit_waits_for_lookups_and_they_for_it() -> None:
    lock, events = LookupLock(), list[str]()
    inside, waiting = threading.Event(), threading.Event()

    def committed() -> None:
        inside.wait()
        waiting.set()
        with lock.committing():
            events.append("commit")

    with ThreadPoolExecutor(1) as pool:
        with lock:
            inside.set()
            job = pool.submit(committed)
            waiting.wait()
            events.append("lookup")
        job.result()
        with lock:
            events.append("lookup")
    assert events == ["lookup", "commit", "lookup"]


def test_a_thread_that_is_inside_enters_again_while_a_commit_waits() -> None:
    lock, inside, done = LookupLock(), threading.Event(), threading.Event()

    def commit() -> None:
        inside.wait()
        with lock.committing():
            done.set()

    thread = threading.Thread(target=commit)
    thread.start()
    with lock:
        inside.set()
        while not lock._committing:  # the commit has come, and waits
            pass
        with lock:
            assert not done.is_set()
        assert not done.is_set()
    thread.join()
    assert done.is_set()
