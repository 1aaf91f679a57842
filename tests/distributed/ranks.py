"""Two processes that stay, joined by gloo: what is sent to them runs on both at once."""

import multiprocessing
import os
import sys
import traceback

import pytest
import torch

RANKS = 2
SECONDS = 120


def serve(rank, rendezvous, connection):
    """Run what comes through `connection`, and answer with the traceback if it fails."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS
    )
    while True:
        function, arguments = connection.recv()
        try:
            getattr(function, "check", function)(*arguments)
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())


class Ranks:
    """The processes; those that hang or fail are replaced, as they may wait for one another."""

    def __init__(self, folder):
        self._folder = folder
        self._processes, self._connections = [], []
        self._generation = 0

    def run(self, function, *arguments):
        """Run a module's function on both ranks; fail with the traceback of each that fails."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        failures = []
        for rank, connection in enumerate(self._connections):
            # Who waits for a rank that has failed will not answer.
            if not connection.poll(5 if failures else SECONDS):
                failures.append(f"rank {rank} does not answer")
                continue
            try:
                failure = connection.recv()
            except EOFError:
                failure = f"the process of rank {rank} has died"
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)

    def stop(self):
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._connections = [], []

    def _start(self):
        self._generation += 1
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(RANKS)]
        self._connections = [mine for mine, _ in ends]
        self._processes = [
            context.Process(
                target=serve,
                args=(rank, self._folder / f"rendezvous{self._generation}", theirs),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in ends:
            theirs.close()


def on_both_ranks(check):
    """Make a test of `check`, which runs on both ranks at once."""

    def test(ranks):
        ranks.run(test)

    test.__name__, test.__qualname__, test.__module__ = (
        check.__name__, check.__qualname__, check.__module__
    )
    # What the processes find under the test's name is the test.
    test.check = check
    return test
