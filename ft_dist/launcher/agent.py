"""The agent of one node: `python -m ft_dist.launcher.agent [options] CONFIG [key=value ...]`, started once per node.

`ft-dist train` is the same on a single node. Several agents meet at `--rdzv HOST:PORT`. The one that can listen there,
on the machine that HOST names, also becomes the head (see head.py) and holds rank 0; the others connect and obey it.
An agent that loses the head kills its workers, which must not train apart from the others, and rejoins.

It does not import torch, so an agent takes 20 MB and starts immediately. We do not use torch's elastic agent because it
flattens exit codes, leaves orphans when it is killed, and could not rejoin after a lost link.
"""

import argparse
import contextlib
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Protocol

from ft_dist.config import PINNED, RunConfig, load_config, pin
from ft_dist.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, UserError
from ft_dist.launcher.elastic.head import Head, Node
from ft_dist.launcher.elastic.rendezvous import Rendezvous, RendezvousServer, connect
from ft_dist.launcher.elastic.restarts import RestartPolicy
from ft_dist.launcher.elastic.wire import Connection, Message
from ft_dist.launcher.elastic.workers import Share, WorkerExit, Workers
from ft_dist.launcher.machine import default_nproc, exit_on_signal
from ft_dist.launcher.nodes import ONE_NODE, Nodes, parse_nodes
from ft_dist.network.channel import ConnectionLostError
from ft_dist.network.secret import VARIABLE, RunSecret, new_secret
from ft_dist.observe.streams import secure_streams
from ft_dist.preemption.signals import heeded
from ft_dist.preflight.node import node_name
from ft_dist.preflight.same import code_hash, config_hash
from ft_dist.run_folder import RunFolder

POLL_S = 0.05
JOIN_TIMEOUT_S = 300.0
MAX_RESTARTS = 3
TRAIN, CHECK = "ft_dist.train", "ft_dist.preflight"


class Link(Protocol):
    """An agent's link to the head, in this process or over the network."""

    def receive(self) -> list[Message]: ...

    def ended(self, worker: WorkerExit, number: int) -> None: ...

    def leaving(self, number: int) -> None: ...

    def wait(self) -> None: ...


class LocalLink:
    """A link to the head in this process. It also serves the rendezvous of the other nodes, if there are any."""

    def __init__(self, head: Head, node: Node, inbox: list[Message], server: RendezvousServer | None) -> None:
        self._head, self._node, self._inbox, self._server = head, node, inbox, server

    def receive(self) -> list[Message]:
        if self._server:
            self._server.serve(self._head)
        self._head.tick()
        found, self._inbox[:] = list(self._inbox), []
        return found

    def ended(self, worker: WorkerExit, number: int) -> None:
        self._head.worker_ended(self._node, number, worker.rank, worker.code)

    def leaving(self, number: int) -> None:
        self._head.leave(self._node, number)

    def wait(self) -> None:
        if self._server:
            self._server.wait(POLL_S)
        else:
            time.sleep(POLL_S)


class RemoteLink:
    """A link to the head on another machine. Every method raises ConnectionLostError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive(self) -> list[Message]:
        return self._connection.receive()

    def ended(self, worker: WorkerExit, number: int) -> None:
        self._connection.send({"type": "ended", "round": number, "rank": worker.rank, "code": worker.code})

    def leaving(self, number: int) -> None:
        self._connection.send({"type": "leaving", "number": number})

    def wait(self) -> None:
        poll = select.poll()
        poll.register(self._connection.socket, select.POLLIN)
        poll.poll(int(POLL_S * 1000))


class Agent:
    """Starts, signals and stops the workers of this node as the head directs, and reports how they end."""

    def __init__(
        self, arguments: Sequence[str], config: RunConfig, *, module: str, environment: Mapping[str, str]
    ) -> None:
        self._config = pin(config)
        self.workers = Workers(arguments, module=module, stdin=self._config, environment=environment)
        self.signalled = False
        self._unhandled: list[int] = []
        self._round = 0

    def __enter__(self) -> "Agent":
        self._previous = {number: signal.signal(number, self._on_signal) for number in heeded()}
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()
        self._config.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        self._unhandled.append(number)

    def obey(self, link: Link) -> int:
        """Obey the head until the run is over; returns the run's exit code. Raises ConnectionLostError."""
        while True:
            while self._unhandled:
                number = self._unhandled.pop(0)
                link.leaving(number)
                if not self.workers.running:
                    return EXIT_PREEMPTED
                self.workers.signal(number)
            for message in link.receive():
                if message["type"] == "over":
                    return int(message["code"])
                self._execute(message)
            for worker in self.workers.ended():
                link.ended(worker, self._round)
            link.wait()

    def _execute(self, message: Message) -> None:
        if message["type"] == "start":
            share = Share(**message["share"])
            self._round = share.round
            self.workers.start(share)
        elif message["round"] == self._round and message["type"] == "signal":
            self.workers.signal(int(message["number"]))
        elif message["round"] == self._round and message["type"] == "stop":
            self.workers.stop()


def run_here(arguments: Sequence[str], config: RunConfig, *, nproc: int, max_restarts: int, module: str = TRAIN) -> int:
    """Run `python -m MODULE ARGUMENTS` on `nproc` ranks of this machine; returns the run's exit code.

    `config` is the ranks' standard input: see `ft_dist.config.pinned`.
    """
    with Agent(arguments, config, module=module, environment={VARIABLE: new_secret()}) as agent:
        return agent.obey(_start_head(agent, config, ONE_NODE, nproc=nproc, max_restarts=max_restarts))


def run_node(
    arguments: Sequence[str],
    config: RunConfig,
    *,
    nodes: Nodes,
    nproc: int,
    rendezvous: Rendezvous,
    local_addr: str | None,
    max_restarts: int,
    join_timeout_s: float,
    module: str = TRAIN,
) -> int:
    """Run this node's part of a run on several nodes; returns the run's exit code."""
    secret = RunSecret(RunFolder(config.run_dir).secret)
    with Agent(arguments, config, module=module, environment={"FT_DIST_NODE": node_name()}) as agent:
        server = RendezvousServer.open(rendezvous, secret)
        if server:
            say(f"{node_name()} is the head of run {rendezvous.run_id}, at {rendezvous}")
            agent.workers.environment[VARIABLE] = secret.value
            with server:
                return agent.obey(
                    _start_head(
                        agent,
                        config,
                        nodes,
                        nproc=nproc,
                        max_restarts=max_restarts,
                        server=server,
                        address=local_addr or rendezvous.host,
                        join_timeout_s=join_timeout_s,
                    )
                )
        return _follow(agent, rendezvous, secret, nproc=nproc, join_timeout_s=join_timeout_s)


def _start_head(
    agent: Agent,
    config: RunConfig,
    nodes: Nodes,
    *,
    nproc: int,
    max_restarts: int,
    server: RendezvousServer | None = None,
    address: str = "127.0.0.1",
    join_timeout_s: float = JOIN_TIMEOUT_S,
) -> LocalLink:
    head = Head(
        minimum=nodes.least,
        maximum=nodes.most,
        policy=RestartPolicy(max_restarts, config.run_dir),
        run_dir=config.run_dir,
        grows_at_commits=config.checkpoint.interval_steps > 0,
        join_timeout_s=join_timeout_s,
        master=lambda: (address, _free_port()),
        say=say,
    )
    inbox: list[Message] = []
    node = Node(node_name(), nproc, inbox.append)
    head.join(node)
    return LocalLink(head, node, inbox, server)


def _follow(agent: Agent, rendezvous: Rendezvous, secret: RunSecret, *, nproc: int, join_timeout_s: float) -> int:
    """Join the head, and rejoin it whenever it is lost, until the run is over or rejoining times out."""
    hello = {"node": node_name(), "nproc": nproc, "agent": secrets.token_hex(4)}
    while True:
        connection = connect(
            rendezvous, hello, secret=secret, timeout_s=join_timeout_s, stop=lambda: agent.signalled, say=say
        )
        if connection is None:
            return EXIT_PREEMPTED if agent.signalled else EXIT_FAILED
        agent.workers.environment[VARIABLE] = secret.value
        try:
            code = agent.obey(RemoteLink(connection))
            connection.finish()
            return code
        except ConnectionLostError as error:
            connection.close()
            agent.workers.kill()
            if agent.signalled:
                return EXIT_PREEMPTED
            say(f"{node_name()} lost the head at {rendezvous}: {error}; killed its workers, rejoining")


def say(line: str) -> None:
    """Print to the console of this node. Standard output belongs to rank 0."""
    with contextlib.suppress(OSError):
        print(f"ft-dist: {line}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ft_dist.launcher.agent", description="One node's part of a run. Start it once on every node."
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--nnodes", default="1", metavar="N|MIN:MAX", help="number of nodes [default: 1]")
    parser.add_argument("--nproc", type=int, help="workers on this node [default: one per GPU, or 1 on CPU]")
    parser.add_argument("--rdzv", metavar="HOST:PORT", help="rendezvous of the nodes: the address of one of them")
    parser.add_argument(
        "--run-id", default=None, help="name of the run; agents of other runs are refused [default: output_dir]"
    )
    parser.add_argument("--local-addr", help="address at which the others reach this node if it becomes the head")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=MAX_RESTARTS,
        help="maximum worker restarts between two commits [default: 3]",
    )
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=JOIN_TIMEOUT_S,
        metavar="S",
        help="seconds to wait for other nodes [default: 300]",
    )
    parser.add_argument("--check", action="store_true", help="check that the nodes can train, and exit")
    options = parser.parse_intermixed_args(argv)
    secure_streams()
    exit_on_signal()
    try:
        return _run(options)
    except UserError as error:
        say(f"error: {error}")
        return EXIT_USER


def _run(options: argparse.Namespace) -> int:
    from ft_dist.check import check

    arguments = [PINNED, options.config, *options.overrides]
    nodes = parse_nodes(options.nnodes, option="--nnodes")
    nproc = options.nproc or default_nproc()
    if nproc < 1 or options.max_restarts < 0:
        raise UserError(f"--nproc {nproc} --max-restarts {options.max_restarts}: must be at least 1 and 0.")
    config = load_config(options.config, options.overrides)
    check(config, world_size=nodes.most * nproc)
    module, max_restarts = (CHECK, 0) if options.check else (TRAIN, options.max_restarts)
    if nodes.most == 1:
        return run_here(arguments, config, nproc=nproc, max_restarts=max_restarts, module=module)
    if not options.rdzv:
        raise UserError(f"--nnodes {options.nnodes} needs --rdzv HOST:PORT, the same on every node.")
    return run_node(
        arguments,
        config,
        nodes=nodes,
        nproc=nproc,
        rendezvous=Rendezvous.parse(
            options.rdzv,
            run_id=options.run_id or str(config.run_dir),
            code=code_hash(),
            config=config_hash(config),
        ),
        local_addr=options.local_addr,
        max_restarts=max_restarts,
        join_timeout_s=options.join_timeout,
        module=module,
    )


if __name__ == "__main__":
    sys.exit(main())
