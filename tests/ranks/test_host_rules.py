"""Which rank runs on which host, and which files travel: plain rules, no process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.ranks import machine
from fsdp_testkit.ranks.agent import AgentOptions, interface_of
from fsdp_testkit.ranks.hosts import Hosts, parse_address
from fsdp_testkit.ranks.hosts_link import HostsLink, _Agent
from fsdp_testkit.ranks.link import Place
from fsdp_testkit.ranks.mirror import TOKEN, Mirror, TooLargeError
from fsdp_testkit.ranks.place import deal
from fsdp_testkit.ranks.translate import host_spec, our_reply
from fsdp_testkit.ranks.wire import WireError

SECRET = b"0123456789abcdef"
TWO = [("a", 1), ("a", 1), ("b", 1), ("b", 1)]


def hosts_of(agents: list[tuple[str, int]], ranks: int, together: int = 1) -> str:
    return "".join(place.host for _, place in deal(agents, ranks, together))


@pytest.mark.parametrize(
    ("agents", "ranks", "together", "hosts"),
    [
        (TWO, 1, 1, "a"),
        (TWO, 2, 1, "ab"),
        (TWO, 3, 1, "aab"),
        (TWO, 4, 1, "aabb"),
        (TWO, 2, 2, "aa"),
        (TWO, 4, 2, "aabb"),
        ([("a", 4), ("b", 2)], 6, 1, "aaaabb"),
        ([("a", 4), ("b", 2)], 6, 2, "aaaabb"),
        ([("a", 3), ("b", 3)], 4, 2, "aabb"),
        ([("a", 2), ("b", 2), ("c", 2)], 4, 2, "aabb"),
        ([("a", 8)], 4, 2, "aaaa"),
    ],
)
def test_ranks_are_spread_evenly_in_blocks(
    agents: list[tuple[str, int]], ranks: int, together: int, hosts: str
) -> None:
    assert hosts_of(agents, ranks, together) == hosts


def test_each_agent_starts_no_more_than_it_offers() -> None:
    dealt = deal([("a", 2), ("b", 1), ("b", 3)], 6)
    assert [agent for agent, _ in dealt] == [0, 0, 1, 2, 2, 2]
    assert [(place.local_rank, place.local_world_size) for _, place in dealt] == [
        *((0, 2), (1, 2)),
        *((rank, 4) for rank in range(4)),
    ]


@pytest.mark.parametrize(
    ("agents", "ranks", "together", "message"),
    [
        (TWO, 5, 1, "5 ranks do not fit: a has 2, b has 2"),
        ([("a", 3), ("b", 3)], 6, 2, "6 ranks in blocks of 2 that stay on one host do not fit: a has 3, b has 3"),
        (TWO, 3, 2, "together=2 must divide the 3 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(agents: list[tuple[str, int]], ranks: int, together: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deal(agents, ranks, together)


@pytest.mark.parametrize("room", [[("a", 2), ("b", 2)], [("a", 4), ("b", 4)], [("a", 2), ("b", 2), ("c", 2), ("d", 2)]])
def test_the_shard_axis_of_hsdp_lies_inside_a_host(room: list[tuple[str, int]]) -> None:
    layout = Layout(kind="hsdp", replicate=2, shard=2)
    hosts = hosts_of(room, layout.world_size, layout.shard)
    by_replica: dict[int, set[str]] = {}
    for rank, host in enumerate(hosts):
        by_replica.setdefault(layout.coordinate(rank)[0], set()).add(host)
    assert all(len(found) == 1 for found in by_replica.values())
    assert len(set(hosts)) == 2, "replicas are on different hosts"


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:x", "a:0", "a:65536", "a:-1"])
def test_addresses_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must look like"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("node1") == ("node1", 29600)
    assert parse_address(" 10.0.0.1:7 ") == ("10.0.0.1", 7)
    with pytest.raises(UsageError, match="each of them once"):
        Hosts(["a", "a:29600"], SECRET)
    assert "0123" not in repr(Hosts(["a"], SECRET))


def test_listening_beyond_loopback_has_to_be_asked_for() -> None:
    for address in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(UsageError, match=r"not loopback.*--beyond-loopback"):
            AgentOptions(address=address, secret=SECRET)
        AgentOptions(address=address, secret=SECRET, beyond_loopback=True)
    AgentOptions(address="127.0.0.1", secret=SECRET)
    with pytest.raises(UsageError, match="ranks=0"):
        AgentOptions(secret=SECRET, ranks=0)
    with pytest.raises(UsageError, match="port=65535"):
        AgentOptions(secret=SECRET, port=65535, local_rank=1)


def test_interfaces_are_found_by_address() -> None:
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("192.0.2.1") == ""


def test_the_loss_of_a_host_is_the_loss_of_its_ranks_alone() -> None:
    state = machine.begin(4, deadline=60, grace=3, now=0)
    state, _ = machine.step(state, machine.Replied(3, "ok"), 1)
    state, actions = machine.step(state, machine.ServerLost((2, 3)), 2)
    assert [rank.status for rank in state.ranks] == ["running", "running", "lost", "ok"]
    assert [rank.alive for rank in state.ranks] == [True, True, False, False]
    assert (state.phase, actions) == (machine.Phase.DRAINING, ())
    _, actions = machine.step(state, machine.Tick(), 5)
    assert actions == (machine.Dump((0, 1)),), "the others are asked where they are after the grace"


# --- files ------------------------------------------------------------------------------------------------------


class Pair:
    """Two sides of a folder, and what travelled."""

    def __init__(self, folder: Path) -> None:
        self.here, self.there = Mirror(folder / "here"), Mirror(folder / "there")
        for side in (self.here, self.there):
            side.root.mkdir()
        self.sent: list[dict[str, Any]] = []

    def push(self, *, back: bool = False, limit: int = 1 << 30) -> list[str]:
        """Send one side's changes to the other; return what was named."""
        source, target = (self.there, self.here) if back else (self.here, self.there)
        names: list[str] = []

        def send(message: dict[str, Any], data: bytes) -> None:
            names.append(next(f"{kind} {message[kind]}" for kind in ("file", "made", "gone") if kind in message))
            target.take(message, data)

        source.send_changes(send, limit)
        return names


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_files_and_folders_travel_once(pair: Pair) -> None:
    (pair.here.root / "sub" / "empty").mkdir(parents=True)
    (pair.here.root / "sub" / "file").write_bytes(b"x" * 10)
    assert pair.push() == ["made sub", "made sub/empty", "file sub/file"]
    assert (pair.there.root / "sub" / "file").read_bytes() == b"x" * 10
    assert (pair.there.root / "sub" / "empty").is_dir()
    assert pair.push() == []
    assert pair.push(back=True) == [], "what came from the other side does not go back"


@pytest.mark.parametrize("size", [0, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_large_and_empty_files_arrive_whole(pair: Pair, size: int) -> None:
    (pair.here.root / "file").write_bytes(bytes(range(256)) * (size // 256) + b"y" * (size % 256))
    pair.push()
    assert (pair.there.root / "file").read_bytes() == (pair.here.root / "file").read_bytes()


def test_changes_and_deletions_travel_in_both_directions(pair: Pair) -> None:
    for name in ("kept", "changed", "gone"):
        (pair.here.root / name).write_text(name)
    pair.push()
    (pair.there.root / "changed").write_text("changed there")
    (pair.there.root / "new").write_text("new")
    (pair.there.root / "gone").unlink()
    assert pair.push(back=True) == ["gone gone", "file changed", "file new"]
    assert sorted(path.name for path in pair.here.root.iterdir()) == ["changed", "kept", "new"]
    assert (pair.here.root / "changed").read_text() == "changed there"
    assert pair.push() == []


def test_a_mapped_file_that_is_replaced_stays_whole(pair: Pair) -> None:
    (pair.here.root / "file").write_text("old")
    pair.push()
    with (pair.there.root / "file").open() as opened:
        (pair.here.root / "file").write_text("new, and longer")
        pair.push()
        assert opened.read() == "old"


def test_nothing_travels_where_too_much_would(pair: Pair) -> None:
    (pair.here.root / "file").write_bytes(b"x" * 2000)
    with pytest.raises(TooLargeError, match="MiB may travel"):
        pair.push(limit=1000)
    assert not (pair.there.root / "file").exists()
    assert pair.push(limit=2000) == ["file file"]


def test_what_belongs_to_one_host_stays_there(pair: Pair) -> None:
    (pair.here.root / ".host-x").mkdir()
    (pair.here.root / ".host-x" / "log").write_text("x")
    (pair.here.root / TOKEN).write_text("x")
    (pair.here.root / "link").symlink_to("/etc/passwd")
    assert pair.push() == []


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ".", ""])
@pytest.mark.parametrize("kind", ["file", "made", "gone"])
def test_paths_that_leave_the_folder_are_refused(pair: Pair, kind: str, name: str) -> None:
    with pytest.raises(WireError, match="no path inside the folder"):
        pair.there.take({kind: name, "at": 0, "last": True}, b"")


def test_a_link_is_not_followed_on_writing(pair: Pair, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (pair.there.root / "file").symlink_to(victim)
    pair.there.take({"file": "file", "at": 0, "last": True}, b"theirs")
    assert victim.read_text() == "mine"
    (pair.there.root / "file").unlink()
    (pair.there.root / "file").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        pair.there.take({"file": "file", "at": 5, "last": True}, b"theirs")


# --- what differs between machines ------------------------------------------------------------------------------


def test_a_rank_is_told_what_holds_on_its_host() -> None:
    spec = {
        "env": {"PATH": "/here", "SAME": "1", "CHANGED": "new", "GLOO_SOCKET_IFNAME": "lo", "FROM_JOB": "x"},
        "job_env": {"FROM_JOB": "x"},
        "world_size": 3,
        "deadline": 100.0,
    }
    places = [Place("a", 0, 2), Place("a", 1, 2), Place("b", 0, 1)]
    before = {"PATH": "/here", "SAME": "1", "CHANGED": "old", "REMOVED": "1"}
    host_spec(spec, places, places[2], 5000.0, before)
    assert spec["env"] == {
        "CHANGED": "new",
        "REMOVED": None,
        "FROM_JOB": "x",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
    }
    assert spec["local_ranks"] == [0, 1, 0]
    assert spec["deadline"] == 5100.0


def test_a_reply_comes_back_on_our_clock() -> None:
    assert json.loads(our_reply(b'{"at": 5100.5, "value": [1]}', 5000.0)) == {"at": 100.5, "value": [1]}
    for line in (b"rubbish", b"[1]", b'{"at": "x"}', b"{}"):
        assert our_reply(line, 5000.0) == line


def test_the_clock_of_a_host_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers last has the least to say: the quickest answer counts."""
    link = HostsLink(Hosts(["a"], SECRET), "fork", (), Path("/nonexistent"), {})
    agent = _Agent(0, "a", ("a", 1), wire=None)  # type: ignore[arg-type]
    delays, now = iter([5.0, 0.0, 3.0, 2.0, 4.0]), [100.0]
    monkeypatch.setattr("fsdp_testkit.ranks.hosts_link.time", SimpleNamespace(monotonic=lambda: now[0]))
    link._send = lambda *_: None  # type: ignore[method-assign]

    def answer(*_: object) -> dict[str, float]:
        now[0] += next(delays)
        return {"now": now[0] + 5000.0}

    link._wait = answer  # type: ignore[assignment, method-assign]
    assert link._clock(agent) == 5000.0
    monkeypatch.undo()
    link.close()
