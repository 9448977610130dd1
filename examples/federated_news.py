"""Fine-tunes a text classifier on clients that hold different classes; adapters and head alone travel.

Starts Flower's own runtime on this machine, with a SuperNode in a process of its own for each client, and runs the app
in `federated/` on it. The embedded BERT and BBC News need no network:

    python examples/federated_news.py --clients 3 --mu 0.1
    python examples/federated_news.py --clients 3 --kill-in-round 2
    python examples/federated_news.py --privacy central
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

APP = Path(__file__).parent / "federated"
HERE = "127.0.0.1"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a model folder, a hub id, or 'embedded'")
    parser.add_argument("--dataset", default="embedded", help="a folder, a CSV or JSON file, a hub id, or 'embedded'")
    parser.add_argument("--clients", type=int, default=2, help="how many clients share out the classes")
    parser.add_argument("--rounds", type=int, default=4, help="how often the clients' weights are averaged")
    parser.add_argument("--mu", type=float, default=0.0, help="FedProx's factor; 0 is FedAvg")
    parser.add_argument("--privacy", choices=("none", "local", "central"), default="none", help="who adds noise")
    parser.add_argument("--kill-in-round", type=int, default=0, help="kills the last client in this round, to see it")
    parser.add_argument("--limit", type=int, default=480, help="at most so many training texts, of all clients")
    parser.add_argument("--epochs", type=float, default=1.0, help="a client's passes over its texts in a round")
    parser.add_argument("--config", default="", help="more settings of the app's pyproject.toml: 'noise=0.2 seed=1'")
    parser.add_argument("--output", type=Path, default=Path("outputs/federated"), help="where adapters and head go")
    return parser.parse_args(argv)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HERE, 0))) for _ in range(count)]
        return [own.getsockname()[1] for own in sockets]


def environment(home: str, port: int) -> dict[str, str]:
    """Returns the environment of Flower's processes: a home of their own, the link's address in it, no telemetry."""
    Path(home, "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{HERE}:{port}"\ninsecure = true\n'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **quiet, "FLWR_HOME": home, "PATH": path}


def wait_for(port: int) -> None:
    for _ in range(300):
        with suppress(OSError), socket.create_connection((HERE, port), timeout=1):
            return
        time.sleep(0.2)
    raise SystemExit("Flower's SuperLink has not started within a minute.")


def start(log: TextIO, env: dict[str, str], program: str, *options: str) -> subprocess.Popen:
    """Starts one of Flower's programs, in a group of its own."""
    command = [str(Path(sys.executable).parent / program), "--insecure", "--host", HERE, *options]
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen, gently: bool = True) -> None:
    if gently:  # so that it ends what it has started
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_config(args: argparse.Namespace) -> str:
    options = {**vars(args), "output": str(args.output.absolute())}
    more, _ = options.pop("config"), options.pop("kill_in_round")
    return " ".join([*(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in options.items()), more])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        log = stack.enter_context(Path(home, "flower.log").open("w+"))
        port, *ports = free_ports(1 + args.clients)
        env = environment(home, port)
        options = ("--port", str(port), "--disable-runtime-dependency-installation")
        stack.callback(stop, start(log, env, "flower-superlink", *options))
        for part, own in enumerate(ports):
            options = ("--port", str(own), "--superlink", f"{HERE}:{port}", "--node-config")
            node = start(log, env, "flower-supernode", *options, f"partition-id={part} num-partitions={args.clients}")
            stack.callback(stop, node)
        wait_for(port)
        command = [str(Path(sys.executable).parent / "flwr"), "run", str(APP), "--stream", "--run-config"]
        run = subprocess.Popen([*command, run_config(args)], env=env, stdout=subprocess.PIPE, text=True)
        stack.callback(run.kill)
        saved = False
        for line in run.stdout:
            print(line, end="", flush=True)
            saved = saved or line.startswith("saved ")
            if f"[ROUND {args.kill_in_round}/" in line:
                stop(node, gently=False)
        if run.wait() or not saved:  # Flower ends well also where the app does not
            raise SystemExit(f"The run has failed. The end of Flower's log:\n{Path(log.name).read_text()[-2000:]}")


if __name__ == "__main__":
    main()
