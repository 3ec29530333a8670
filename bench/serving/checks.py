"""Starts `quetsch serve` and measures what a load tool does not: starting, idling, memory, overload, stopping.

    python checks.py CHECK QUETSCH MODEL PAIRS [--seconds N]      CHECK: cold idle quota soak overload sigterm kill

PAIRS is the file that pairs.py writes. Every check prints one JSON object and fails with a message if an answer is wrong.
Python's standard library only; the soak's load comes from wrk.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Server:
    def __init__(self, args, *flags, port=0, before=None):
        begin = time.perf_counter()
        self.process = subprocess.Popen([args.quetsch, "serve", "--model", args.model, "--port", str(port), *flags],
                                        stdout=subprocess.PIPE, preexec_fn=before)
        line = self.process.stdout.readline().decode()
        self.port = int(line.strip().rsplit(":", 1)[1])
        while not self.healthy():
            time.sleep(0.0005)
        self.ready_ms = (time.perf_counter() - begin) * 1e3

    def healthy(self):
        with socket.create_connection(("127.0.0.1", self.port)) as s:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return s.recv(100).startswith(b"HTTP/1.1 200")

    def status(self, key):
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split(f"{key}:")[1].split()[0]) * 1024 / 1e6  # MB

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def pairs(path):
    lines = Path(path).read_text().splitlines()
    return [line.split("\t") for line in lines]


def percentile(values, p):
    values = sorted(values)
    return round(values[min(len(values) - 1, int(len(values) * p / 100))], 2) if values else None


async def post(reader, writer, body, key=""):
    body = body.encode()
    writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                 % len(body) + body)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split()[1]), (await reader.readexactly(length)).decode()


def cold(args):
    times = []
    for _ in range(args.times):
        server = Server(args)
        times.append(server.ready_ms)
        assert server.stop() == 0
    return {"starts": len(times), "ready_ms_median": percentile(times, 50), "ready_ms_max": percentile(times, 100)}


def kill(args):
    """Killed under load and started again at once, on the same port."""
    times, server = [], Server(args)
    for _ in range(args.times):
        load = wrk(args, server.port, 1, 8, 0.3)
        time.sleep(0.15)
        server.process.kill()
        server.process.wait()
        server = Server(args, port=server.port)
        times.append(server.ready_ms)
        load.communicate()
    server.stop()
    return {"restarts": len(times), "ready_ms_median": percentile(times, 50), "ready_ms_max": percentile(times, 100)}


def idle(args):
    """CPU time while nobody asks, after having worked."""
    server = Server(args)
    wrk(args, server.port, 1, 8, 2).communicate()
    time.sleep(1)
    begin = server.cpu_seconds()
    time.sleep(args.seconds)
    used = server.cpu_seconds() - begin
    server.stop()
    return {"seconds": args.seconds, "cpu_ms": round(used * 1e3)}


def quota(args):
    """Under a CPU quota (a control group, version 1 or 2: needs root), as containers have: what it answers for the CPU
    time that it uses, and that waiting costs none. The threads follow the quota, so nobody spins for another."""
    root = Path("/sys/fs/cgroup")
    first = (root / "cpu/cpu.cfs_quota_us").exists()
    group = (root / "cpu" if first else root) / "quetsch-check"
    group.mkdir(exist_ok=True)

    def throttled():
        stat = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        return int(stat["nr_throttled"])

    rows = []
    try:
        for cores in (0.5, 1.0, 1.5, os.cpu_count()):
            quota, period = round(cores * 100_000), 100_000
            if first:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (group / "cpu.max").write_text(f"{quota} {period}")
            server = Server(args, before=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
            row = {"cores": cores, "ready_ms": round(server.ready_ms)}
            for connections in (1, 8):
                wrk(args, server.port, 1, connections, 1).communicate()
                cpu, held, begin = server.cpu_seconds(), throttled(), time.perf_counter()
                found = json.loads(wrk(args, server.port, 1, connections, args.seconds).communicate()[0].splitlines()[-1])
                cpu, took = server.cpu_seconds() - cpu, time.perf_counter() - begin
                row[f"{connections}_connections"] = {
                    "per_s": found["requests_per_s"], "p99_ms": found["p99_ms"], "cores_used": round(cpu / took, 2),
                    "cpu_ms_per_answer": round(cpu * 1e3 / (found["requests_per_s"] * took), 2), "times_throttled": throttled() - held}
            time.sleep(0.5)
            cpu = server.cpu_seconds()
            time.sleep(args.seconds)
            row["idle_cpu_ms"] = round((server.cpu_seconds() - cpu) * 1e3)
            server.stop()
            rows.append(row)
    finally:
        group.rmdir()
    return {"rows": rows}


def wrk(args, port, threads, connections, seconds, check=False):
    command = ["wrk", "-t", str(threads), "-c", str(connections), "-d", f"{max(1, round(seconds))}s", "--latency",
               "-s", str(HERE / "load.lua"), f"http://127.0.0.1:{port}/predict", "--", args.pairs]
    return subprocess.Popen(command + (["check"] if check else []), stdout=subprocess.PIPE, text=True)


def soak(args):
    """`--requests` requests, every answer compared with that of `predict`; resident memory along the way."""
    server = Server(args, "--max-concurrent-requests", "512")
    wrk(args, server.port, 1, 32, 5).communicate()  # buffers have grown
    begin, done, wrong, failed, rss = time.time(), 0, 0, 0, [server.status("VmRSS")]
    while done < args.requests:
        out = wrk(args, server.port, 32, 32, min(20, args.seconds), check=True).communicate()[0]
        found = json.loads(out.strip().splitlines()[-1])
        done += found["checked"]
        wrong += found["wrong"]
        failed += found["other"] + found["overloaded"] + found["connect"] + found["read"] + found["write"] + found["timeout"]
        rss.append(server.status("VmRSS"))
    answer = {"requests": done, "wrong": wrong, "failed": failed, "seconds": round(time.time() - begin),
              "rss_mb_after_warm_up": round(rss[0], 1), "rss_mb_end": round(rss[-1], 1),
              "rss_mb_peak": round(server.status("VmHWM"), 1), "drift_percent": round((rss[-1] / rss[0] - 1) * 100, 2)}
    assert server.stop() == 0
    assert wrong == 0 and failed == 0, answer
    return answer


async def open_loop(port, bodies, rate, seconds, connections=128):
    """Requests at fixed times, whether or not earlier ones are answered; (status, latency from its time) of each."""
    free = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", port))
    results, late = [], 0

    async def one(body, due):
        connection = await free.get()
        status, _ = await post(*connection, body)
        results.append((status, (time.perf_counter() - due) * 1e3))
        free.put_nowait(connection)

    begin, tasks = time.perf_counter(), set()
    for i in range(int(rate * seconds)):
        due = begin + i / rate
        delay = due - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        else:
            late += 1
            await asyncio.sleep(0)
        task = asyncio.create_task(one(bodies[i % len(bodies)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    took = time.perf_counter() - begin
    await asyncio.gather(*tasks)
    while not free.empty():
        free.get_nowait()[1].close()
    return results, took


def overload(args):
    """Four times what the server can do, in requests of 32 texts so that this script is not the bottleneck."""
    server = Server(args)
    texts = [json.loads(request)["inputs"] for request, _ in pairs(args.pairs)]
    bodies = [json.dumps({"inputs": [[t] for t in texts[i:i + 32]], "top_k": 1}) for i in range(0, len(texts) - 32, 32)]

    async def capacity():
        """Texts a second of four clients that wait for their answers."""
        async def client(n):
            connection, count, end = await asyncio.open_connection("127.0.0.1", server.port), 0, time.time() + 5
            while time.time() < end:
                status, _ = await post(*connection, bodies[(n + count) % len(bodies)])
                assert status == 200
                count += 1
            connection[1].close()
            return count
        return sum(await asyncio.gather(*map(client, range(4)))) * 32 / 5

    texts_per_s = asyncio.run(capacity())
    rate = 4 * texts_per_s / 32
    results, took = asyncio.run(open_loop(server.port, bodies, rate, args.seconds))
    statuses = {s: sum(1 for status, _ in results if status == s) for s in sorted({s for s, _ in results})}
    time.sleep(1)  # full recovery within 1 s
    after, _ = asyncio.run(open_loop(server.port, bodies[:1], texts_per_s / 32 / 2, 4))  # half of what it can do
    accepted = [ms for status, ms in results if status == 200]
    answer = {"capacity_texts_per_s": round(texts_per_s), "offered_texts_per_s": round(len(results) * 32 / took),
              "seconds": args.seconds, "statuses": statuses, "accepted_p50_ms": percentile(accepted, 50),
              "accepted_p99_ms": percentile(accepted, 99),
              "queue_limit_ms": round(512 / texts_per_s * 1e3), "rss_mb_peak": round(server.status("VmHWM"), 1),
              "after_1_s": {"statuses": sorted({s for s, _ in after}), "p99_ms": percentile([ms for _, ms in after], 99)}}
    assert server.stop() == 0
    assert set(statuses) <= {200, 429} and answer["after_1_s"]["statuses"] == [200], answer
    return answer


def sigterm(args):
    """SIGTERM under load, again and again: a request that was sent is answered, or its connection was never taken."""
    sent = answered = lost = 0
    cases = pairs(args.pairs)

    async def client(port, n, stopped):
        nonlocal sent, answered, lost
        connection = await asyncio.open_connection("127.0.0.1", port)
        i = n
        while True:
            request, want = cases[i % len(cases)]
            i += 31
            before = stopped.is_set()
            try:
                status, body = await post(*connection, request)
            except (asyncio.IncompleteReadError, ConnectionError):
                # The server closes idle connections; a request that crossed that on the wire was not accepted. One
                # that was sent before the signal was.
                if not before:
                    lost += 1
                return
            sent += 1
            assert status == 200 and body == want, (status, body, want)
            answered += 1
            if before:
                return

    async def one(server):
        stopped = asyncio.Event()
        clients = [asyncio.create_task(client(server.port, n, stopped)) for n in range(32)]
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        stopped.set()
        await asyncio.gather(*clients)

    begin, took = time.perf_counter(), []
    for _ in range(args.times):
        server = Server(args)
        asyncio.run(one(server))
        end = time.perf_counter()
        assert server.process.wait(60) == 0
        took.append((time.perf_counter() - end) * 1e3)
    answer = {"stops": args.times, "answered": answered, "sent_before_the_signal_and_lost": lost,
              "exit_after_last_answer_ms_max": percentile(took, 100)}
    assert lost == 0, answer
    return answer


def main():
    checks = {f.__name__: f for f in (cold, idle, quota, soak, overload, sigterm, kill)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=checks)
    parser.add_argument("quetsch")
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--requests", type=int, default=1_000_000)
    args = parser.parse_args()
    print(json.dumps({"check": args.check, **checks[args.check](args)}))


if __name__ == "__main__":
    sys.exit(main())
