"""Fine-tunes a text classifier on clients that hold different classes; adapters and head alone travel.

Starts Flower's runtime on this machine, each client in processes of its own, and runs the app in `federated/` on it:

    python examples/federated_news.py --clients 3 --mu 0.1
    python examples/federated_news.py --clients 3 --kill-in-round 2 --privacy central
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
from contextlib import suppress
from pathlib import Path
from typing import TextIO

APP = Path(__file__).parent / "federated"
PROGRAMS = Path(sys.executable).parent
AS_INSTALLED = "--disable-runtime-dependency-installation"
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


def environment(home: str, port: int) -> dict[str, str]:
    """Returns the environment of Flower's processes: a home of their own with the link's address, and no telemetry."""
    link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{HERE}:{port}"\ninsecure = true\n'
    Path(home, "config.toml").write_text(link)
    flower = {"FLWR_HOME": home, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **flower, "TMPDIR": home, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def start(log: TextIO, env: dict[str, str], name: str, *options: str) -> subprocess.Popen:
    """Starts one of Flower's programs, in a group of its own."""
    command = [str(PROGRAMS / name), "--insecure", "--host", HERE, *options]
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def stop(processes: Sequence[subprocess.Popen], how: int = signal.SIGTERM) -> None:
    for process in processes:
        process.send_signal(how)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, and has not ended


def wait_for(port: int) -> None:
    for _ in range(300):
        with suppress(OSError), socket.create_connection((HERE, port), timeout=1):
            return
        time.sleep(0.2)
    raise RuntimeError("Flower's SuperLink has not started within a minute.")


def run(args: argparse.Namespace, env: dict[str, str], processes: list[subprocess.Popen]) -> None:
    """Runs the app, and prints what the server prints."""
    settings = {**vars(args), "output": str(args.output.absolute())}
    more, kill, nodes = settings.pop("config"), settings.pop("kill_in_round"), processes[1:]
    config = " ".join([*(f"{name}={json.dumps(value)}" for name, value in settings.items()), more])
    command = [str(PROGRAMS / "flwr"), "run", str(APP), "--stream", "--run-config", config]
    processes.append(running := subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    saved = False  # Flower ends well also where the app does not
    for line in running.stdout:
        print(line, end="", flush=True)
        saved = saved or line.startswith("saved ")
        if f"[ROUND {kill}/" in line:
            stop(nodes[-1:], signal.SIGKILL)
    if not saved:
        gone = [part for part, node in enumerate(nodes) if node.poll() is not None]
        raise RuntimeError(f"The run has failed. Clients whose process has ended: {gone or 'none'}.")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not (PROGRAMS / "flwr").exists():
        raise SystemExit(f"There is no flwr in {PROGRAMS}. Install it there: pip install 'hf-freeze[demo,federated]'")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, Path(home, "flower.log").open("w+") as log:
        doors = [socket.create_server((HERE, 0)) for _ in range(1 + args.clients)]
        port, *ports = [(door.getsockname()[1], door.close())[0] for door in doors]  # free ones
        env, processes = environment(home, port), []
        try:
            processes.append(start(log, env, "flower-superlink", "--port", str(port), AS_INSTALLED))
            for part, own in enumerate(ports):
                config = f"partition-id={part} num-partitions={args.clients}"
                options = ("--port", str(own), "--superlink", f"{HERE}:{port}", "--node-config", config)
                processes.append(start(log, env, "flower-supernode", *options))
            wait_for(port)
            run(args, env, processes)
        except RuntimeError as error:
            raise SystemExit(f"{error} The end of Flower's log:\n{Path(log.name).read_text()[-2000:]}") from None
        finally:
            stop(processes)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it stops what it has started
    main()
