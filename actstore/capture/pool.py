"""The replicas of one run: give them tasks, restart those that fail, and say when nothing can go on.

A replica is in one of four states. Whatever fails in the first three brings it back to `placing`, as a fresh process:

    placing   it waits for a machine; where the cluster has no room, Ray's autoscaler is asked for it
    loading   it has a machine and loads the model
    live      it is given tasks, at most `CALLS_IN_FLIGHT` at a time
    gone      `ATTEMPTS` processes ended before they could say on which node: Ray can't start them there

A failed task goes to whichever replica is free next, because doing one again writes the same bytes. A node on which
`NODE_FAILURES` calls and at least one in ten failed is quarantined: its replicas finish their tasks and move to other
nodes. A node that refuses to load the model (other versions, no such model, too little memory) is quarantined at once.

The run ends when a failure is certain to repeat everywhere, when one task failed on `TASK_NODES` nodes, or when no
replica is left that could go on.
"""

import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from actstore.capture.events import EventLog
from actstore.capture.replicas import LostError, Replicas
from actstore.capture.segments import Work
from actstore.capture.worker import CALLS_IN_FLIGHT, Again, Failure
from actstore.errors import CaptureError

ATTEMPTS = 6
NODE_FAILURES = 3
TASK_NODES = 3
"""A task also ends the run when it failed twice this often on fewer nodes."""
POLL_S = 0.5
WAITING_S = 30.0
"""Seconds without any worker after which the command says so, and says it again."""
JOIN_S = 60.0
"""Seconds that a cluster without an autoscaler has for machines that are still joining it."""
LONGEST_DELAY_S = 600.0


@dataclass(frozen=True)
class Task:
    """A call of a replica's method."""

    method: str
    argument: Work | int
    key: int
    """What `Replica.rows_done` knows it by: the bucket."""
    name: str
    """What messages call it."""


@dataclass
class _Worker:
    handle: Any = None
    generation: int = 0
    """How often it was started; an answer of an earlier generation says nothing about this one."""
    state: Literal["placing", "loading", "live", "gone"] = "placing"
    node: str = ""
    attempts: int = 0
    """Processes that ended before they had a node, since it was last live."""


@dataclass(frozen=True)
class _Call:
    worker: int
    generation: int
    node: str
    method: str
    task: Task | None
    began: float


class Pool:
    """The replicas of one run. `run` may be called again with other tasks; the replicas keep their models."""

    def __init__(
        self,
        replicas: Replicas,
        log: EventLog,
        *,
        workers: int,
        show: Callable[[int, "Pool"], None],
        say: Callable[[str], None],
    ) -> None:
        """Ask for `workers` replicas.

        `show` is called every now and then, with the number of rows of unfinished buckets that have left the models;
        `say` with what the user should know now.
        """
        self._replicas, self._log, self._show, self._say = replicas, log, show, say
        self._calls: dict[Any, _Call] = {}
        self._delayed: list[tuple[float, Task]] = []
        self._retries: Counter[str] = Counter()
        """Per task, how often another run took it over."""
        self._rows: dict[int, int] = {}
        self._polled = 0.0
        self._failures: dict[str, list[str]] = defaultdict(list)
        """Per node: the errors of its workers, one for each time a worker was restarted."""
        self._task_failures: dict[str, list[str]] = defaultdict(list)
        """Per task: the nodes on which it failed."""
        self._done: Counter[str] = Counter()
        self.needs = replicas.needs
        self.quarantined: set[str] = set()
        self.losses = 0
        """Tasks that were taken back from a worker that failed or died."""
        self._waiting_since = self._said = time.monotonic()
        self._workers = [_Worker() for _ in range(workers)]
        for worker in range(workers):
            self._place(worker)

    def close(self) -> None:
        """End all replicas."""
        for worker in self._workers:
            self._replicas.discard(worker.handle)

    @property
    def live(self) -> int:
        """How many replicas are ready for tasks."""
        return sum(worker.state == "live" for worker in self._workers)

    def run(self, tasks: Iterable[Task], done: Callable[[Any, int], None]) -> None:
        """Do all tasks; `done` is called with each result and the number of its worker.

        Raises the error that ended the run; what is committed stays.
        """
        todo = deque(tasks)
        while todo or self._delayed or any(call.task for call in self._calls.values()):
            now = time.monotonic()
            todo += [task for due, task in self._delayed if due <= now]
            self._delayed = [(due, task) for due, task in self._delayed if due > now]
            self._leave_quarantined_nodes()
            self._assign(todo)
            self._poll(now)
            for reference in self._replicas.wait([*self._calls], POLL_S):
                self._answer(self._calls.pop(reference), reference, todo, done)
            self._check_progress()
            in_work = {call.task.key for call in self._calls.values() if call.task}
            self._show(sum(rows for key, rows in self._rows.items() if key in in_work), self)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _note(self, reference: Any, worker: int, method: str, task: Task | None = None) -> None:
        about = self._workers[worker]
        self._calls[reference] = _Call(worker, about.generation, about.node, method, task, time.monotonic())

    def _place(self, number: int) -> None:
        worker = self._workers[number]
        worker.handle, worker.state, worker.node = self._replicas.create(self.quarantined), "placing", ""
        worker.generation += 1
        self._note(self._replicas.call(worker.handle, "place"), number, "place")

    def _assign(self, todo: deque[Task]) -> None:
        """Give every replica its first task before any gets its second one."""
        busy = Counter(call.worker for call in self._calls.values() if call.task)
        for load in range(CALLS_IN_FLIGHT):
            for number, worker in enumerate(self._workers):
                ready = worker.state == "live" and worker.node not in self.quarantined
                if todo and ready and busy[number] == load:
                    task = todo.popleft()
                    reference = self._replicas.call(worker.handle, "call", task.method, task.argument)
                    self._note(reference, number, task.method, task)
                    busy[number] += 1

    def _poll(self, now: float) -> None:
        """Ask for progress, seldom enough for many workers."""
        if now - self._polled < max(POLL_S, self.live / 200):
            return
        self._polled = now
        asked = {call.worker for call in self._calls.values() if call.method == "rows_done"}
        for number, worker in enumerate(self._workers):
            if worker.state == "live" and number not in asked:
                self._note(self._replicas.call(worker.handle, "rows_done"), number, "rows_done")

    def _answer(self, call: _Call, reference: Any, todo: deque[Task], done: Callable[[Any, int], None]) -> None:
        """Act on the result of a call."""
        worker, task = self._workers[call.worker], call.task
        try:
            result: Any = self._replicas.result(reference)
        except LostError as e:
            result = Failure(error=None, text=str(e), traceback="", everywhere=False)
        if task:
            self._rows.pop(task.key, None)
        if isinstance(result, Failure):
            if task:
                self.losses += 1
                todo.appendleft(task)
            self._failed(call, result)
        elif task and isinstance(result, Again):
            self._delay(task, time.monotonic() - call.began)
        elif task:
            self._done[call.node] += 1
            done(result, call.worker)
        elif call.method == "rows_done":
            self._rows |= result
        elif call.generation != worker.generation:
            pass  # it was moved meanwhile
        elif call.method == "place":
            worker.node, worker.state = result["node"], "loading"
            if worker.node not in self.quarantined:
                self._note(self._replicas.start(worker.handle, worker.node), call.worker, "start")
        else:
            worker.state, worker.attempts = "live", 0
            self._log.write("worker", worker=call.worker, node=self._replicas.name(worker.node), **result)

    def _delay(self, task: Task, seconds: float) -> None:
        """Leave a task to the other run that took it over; take it again unless it was committed by then.

        The delay begins at what the task takes and doubles, and is random: two live runs must not take a bucket from
        each other for ever.
        """
        self._retries[task.name] += 1
        delay = max(seconds, 1.0) * 2 ** (self._retries[task.name] - 1) * random.uniform(0.5, 1.5)  # noqa: S311
        self._delayed.append((time.monotonic() + min(delay, LONGEST_DELAY_S), task))

    @property
    def taken_over(self) -> int:
        """How often another run took a task over."""
        return self._retries.total()

    # -- failures -----------------------------------------------------------------------------------------------------

    def _failed(self, call: _Call, failure: Failure) -> None:
        """Count a failure to its task and its node, and start the replica again; raise what ends the run.

        When a process dies, all its calls fail. Each counts to its task, and one of them to the node.
        """
        worker, what = self._workers[call.worker], call.task.name if call.task else call.method
        if call.method == "rows_done" and any(c.task and c.worker == call.worker for c in self._calls.values()):
            return  # the tasks of the dead replica will say so too
        node = self._replicas.name(call.node)
        about = {"task": what, "error": failure.text, "traceback": failure.traceback}
        self._log.write("failure", worker=call.worker, node=node, **about)
        if failure.everywhere or (failure.error and not self._replicas.cluster):
            raise failure.error or CaptureError(failure.text)
        if call.task:
            self._task_failures[call.task.name].append(call.node)
            self._check_task(call.task.name, failure)
        if call.generation == worker.generation and worker.state != "gone":
            self._failures[call.node].append(failure.text)
            self._quarantine(call.node, refused=worker.state == "loading" and failure.error is not None)
            self._restart(call.worker, failure)

    def _restart(self, number: int, failure: Failure) -> None:
        worker = self._workers[number]
        worker.attempts += worker.state == "placing"
        self._replicas.discard(worker.handle)
        if worker.attempts < ATTEMPTS:
            self._place(number)
        else:
            worker.state = "gone"
            self._say(
                f"worker {number} could not be started {ATTEMPTS} times, the run goes on without it: {failure.text}"
            )

    def _check_task(self, task: str, failure: Failure) -> None:
        """Raise if a task failed too often. Nodes that are gone don't count: such a machine may have been preempted."""
        hosts = self._replicas.hosts()
        times = Counter(node for node in self._task_failures[task] if node in hosts)
        if len(times) >= TASK_NODES or times.total() >= 2 * TASK_NODES:
            raise CaptureError(
                f"{task} failed {times.total()} times on {len(times)} node{'s' * (len(times) > 1)}, the last time with "
                f"{failure.text}; committed buckets are kept"
            )

    def _quarantine(self, node: str, *, refused: bool) -> None:
        failures = len(self._failures[node])
        often = failures >= NODE_FAILURES and failures * 10 > self._done[node]
        if node and node not in self.quarantined and (refused or often):
            self.quarantined.add(node)
            name, error = self._replicas.name(node), self._failures[node][-1]
            self._log.write("quarantine", node=name, failures=failures)
            self._say(f"no more tasks for {name} after {_failures(failures)}: {error}")

    def _leave_quarantined_nodes(self) -> None:
        busy = {call.worker for call in self._calls.values() if call.task}
        for number, worker in enumerate(self._workers):
            if worker.state in ("loading", "live") and worker.node in self.quarantined and number not in busy:
                self._replicas.discard(worker.handle)
                self._place(number)

    def _check_progress(self) -> None:
        """Say it every `WAITING_S` seconds while no replica has a machine; raise if none can ever have one."""
        now = time.monotonic()
        healthy = [w for w in self._workers if w.state in ("loading", "live") and w.node not in self.quarantined]
        if healthy or any(call.task for call in self._calls.values()):
            self._waiting_since = self._said = now
            return
        hosts = self._replicas.hosts()
        if (hosts and hosts <= self.quarantined) or all(w.state == "gone" for w in self._workers):
            raise CaptureError(f"no worker can go on, committed buckets are kept{self._causes()}")
        if now - self._waiting_since > JOIN_S and (shortage := self._replicas.shortage()):
            raise CaptureError(shortage + self._causes())
        if now - self._said > WAITING_S:
            self._said = now
            self._log.write("waiting", needs=self.needs)
            self._say(f"waiting for a machine with {self.needs} free")

    def _causes(self) -> str:
        """What each node failed with last: nodes of one cause on one line."""
        nodes: dict[str, list[str]] = defaultdict(list)
        for node, failures in self._failures.items():
            nodes[failures[-1]].append(f"{self._replicas.name(node)}, {_failures(len(failures))}")
        lines = [f"{'; '.join(names)}: {error}" for error, names in nodes.items()]
        return f": {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _failures(number: int) -> str:
    return f"{number} failure{'s' * (number > 1)}"
