from __future__ import annotations

import threading
import time

import pytest

from router_service.backends.edge.served import FifoLock


def test_it_is_handed_on_in_the_order_of_asking() -> None:
    lock, order = FifoLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        threads = []
        for number in range(5):
            thread = threading.Thread(target=take, args=(number,))
            thread.start()
            while len(lock._waiting) <= number:
                time.sleep(0.001)
            threads.append(thread)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_a_loop_of_short_holds_does_not_keep_others_out() -> None:
    lock, done = FifoLock(), threading.Event()

    def hog() -> None:
        while not done.is_set():
            with lock:
                time.sleep(0.001)

    thread = threading.Thread(target=hog)
    thread.start()
    for _ in range(20):
        with lock:
            pass
    done.set()
    thread.join()


def test_an_error_inside_gives_it_back() -> None:
    lock = FifoLock()
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    with lock:
        pass
