"""Clients that go away, and what an operator does meanwhile: aborts, resets, pauses."""

import pytest


class Faults:
    """Does to the engine, between its steps and inside them, what the seed says.

    Attributes:
        pending_abort: name of a request whose abort came in another thread, if one did.
    """

    def __init__(self, simulation):
        self.simulation = simulation
        self.core, self.scheduler = simulation.core, simulation.scheduler
        self.manager, self.chats = simulation.manager, simulation.chats
        self.steps, self.seen = simulation.steps, simulation.seen
        self.rng, self.scenario = simulation.rng, simulation.scenario
        self.pending_abort = None

    def interrupt(self, where):
        """A client's abort arrives in another thread, whatever the engine does."""
        alive = list(self.scheduler.requests) if self.pending_abort is None else []
        if alive and self.rng.random() < self.scenario.faulty:
            self.pending_abort = self.rng.choice(alive)
            self.note_abort(self.pending_abort, where)
            self.core.aborts_queue.put_nowait([self.pending_abort])

    def note_abort(self, name, where):
        self.simulation.note("aborts", name, where)
        self.chats[name].aborted = True
        request = self.scheduler.requests.get(name)
        if request is not None:
            self.seen[f"aborted {where}"] += 1
            self.seen["aborted in flight"] += self.simulation.in_flight(name)
            self.seen["aborted in its prune step"] += self.simulation.is_in_prune_step(name)
            self.seen["aborted before its first step"] += name not in self.manager.prompts

    def act(self):
        """Whatever clients and operators do between two steps."""
        if self.pending_abort is not None:  # vLLM gets it a second time, among the other requests
            self.core.abort_requests([self.pending_abort])
            self.pending_abort = None
            self.simulation.invariants.remember()
        rng, faulty = self.rng, self.scenario.faulty
        alive = list(self.scheduler.requests)
        if alive and rng.random() < faulty:
            name = rng.choice(alive)
            self.note_abort(name, "between steps")
            self.core.abort_requests([name])
        if alive and rng.random() < faulty / 2:
            self._add_twice(rng.choice(alive))
        if rng.random() < faulty / 2:
            self._reset()
        if rng.random() < faulty / 3:
            self._pause()
        self.simulation.invariants.remember()
        self.simulation.invariants.check()

    def _add_twice(self, name):
        """A second request of the same name is refused, and the first one does not notice."""
        if name not in self.scheduler.requests:
            return
        self.simulation.note("adds", name, "again")
        twin, wave = self.core.preprocess_add_request(self.chats[name].engine_request())
        with pytest.raises(AssertionError, match="duplicate request id"):
            self.core.add_request(twin, wave)
        self.seen["duplicates refused"] += 1

    def _reset(self):
        kind = self.rng.choice(["prefix cache", "running requests", "encoder cache", "all"])
        self.simulation.note("resets", kind)
        self.seen[f"reset of {kind} in flight"] += bool(self.steps)
        if kind in ("prefix cache", "running requests"):
            done = self.core.reset_prefix_cache(reset_running_requests=kind != "prefix cache")
            assert done or kind == "prefix cache"
            self.seen["reset refused while requests run"] += not done
        elif kind == "encoder cache":
            self.core.reset_encoder_cache()
        else:
            self.core._reset_caches()

    def _pause(self):
        """Pause or sleep, add requests meanwhile, and go on."""
        mode, sleeps = self.rng.choice(["abort", "keep"]), self.rng.random() < 0.5
        self.simulation.note("pauses", mode, "and sleeps" if sleeps else "")
        self.seen[f"paused to {mode} in flight"] += bool(self.steps)
        if mode == "abort":
            for name in self.scheduler.requests:
                self.note_abort(name, "by a pause")
        if sleeps:
            self.core.sleep(level=1, mode=mode)
        else:
            self.core.pause_scheduler(mode=mode, clear_cache=self.rng.random() < 0.5)
        self.simulation.invariants.remember()
        self.simulation.invariants.check()
        for _ in range(self.rng.randrange(3)):
            self.simulation.add()
            self.simulation.advance()
        if sleeps:
            self.core.wake_up()
        else:
            self.core.resume_scheduler()
