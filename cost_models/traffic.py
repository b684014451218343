"""What travels between ranks in a simulated step: messages and collectives, from when their ends
are ready to when they are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.trace import event_name
from .discrete_events import Clock, Process
from .exchanges import Exchange
from .simulated_rank import Meeting, Message
from .wires import Flow, Wires

__all__ = ["Traffic"]

Told = Callable[[int, str, float, float, bool], None]


class Traffic:
    """Messages and collectives under way, on `wires`.

    Args:
        told: of each, of every rank that takes part: rank, name, begin and end in seconds, and
            whether it is of gradients or of updated parameters.
    """

    def __init__(self, clock: Clock, cluster: Cluster, wires: Wires, told: Told) -> None:
        self.link_bytes: dict[tuple[int, int], float] = defaultdict(float)
        self._clock = clock
        self._cluster = cluster
        self._wires = wires
        self._told = told
        self._messages: dict[tuple[int, int, int], Message] = {}
        self._last_message: dict[tuple[int, int], Message] = {}
        self._last_meeting: dict[tuple[int, ...], Meeting] = {}
        self._meetings: dict[tuple[tuple[int, ...], str], list[Meeting]] = defaultdict(list)
        self._turns: dict[tuple[int, tuple[int, ...], str], int] = defaultdict(int)

    def message(self, source: int, target: int, tag: int) -> Message:
        """The message from `source` to `target` with `tag`, which is carried once both its ends
        are known."""
        key = source, target, tag
        if key not in self._messages:
            self._messages[key] = Message()
            self._clock.start(self._carry((source, target), self._messages[key]))
        return self._messages[key]

    def _carry(self, pair: tuple[int, int], message: Message) -> Process:
        yield message.sent
        yield message.posted
        assert message.send is not None and message.recv is not None
        before = self._last_message.get(pair)
        self._last_message[pair] = message
        begin, size = self._clock.now, message.send.type.num_bytes
        link = self._cluster.link(*pair)
        yield self._clock.later(link.latency_seconds)
        if before is not None:
            yield before.left
            begin = max(begin, (before.left.seconds or 0.0) - link.latency_seconds)
        flow = Flow((pair,), 0.0, size / link.bytes_per_second)
        yield from self._wires.carry(flow)
        end = self._clock.now
        self.link_bytes[pair] += size
        self._told(pair[0], event_name(message.send) or "", begin, end, False)
        self._told(pair[1], event_name(message.recv) or "", begin, end, False)
        self._clock.happen(message.left)
        self._clock.happen(message.arrived)

    def meet(
        self, rank: int, entry: Exchange, names: Sequence[tuple[str, float]], channel: str
    ) -> Meeting:
        """`rank` reaches its next meeting with the ranks of `entry` in `channel`.

        Args:
            names: of the events that it makes, one after the other, and the share of each.
        """
        group = tuple(sorted(entry.ranks))
        turn = self._turns[rank, group, channel]
        self._turns[rank, group, channel] += 1
        meetings = self._meetings[group, channel]
        if turn == len(meetings):
            meetings.append(Meeting(entry, names, channel == "program", channel == "hidden"))
        meeting = meetings[turn]
        meeting.reached += 1
        if meeting.reached == len(group):
            before = self._last_meeting.get(group)
            self._last_meeting[group] = meeting
            self._clock.start(self._hold(group, meeting, before))
        return meeting

    def _hold(self, group: tuple[int, ...], meeting: Meeting, before: Meeting | None) -> Process:
        if before is not None:
            yield before.end
        begin, entry = self._clock.now, meeting.exchange
        edges = tuple(edge for edge, _ in entry.edges)
        if edges:
            flow = Flow(
                edges,
                entry.latency_seconds,
                entry.wire_seconds,
                entry.collective,
                is_handled=meeting.is_hidden and entry.handling_seconds > 0.0,
            )
            yield from self._wires.carry(flow)
        for edge, size in entry.edges:
            self.link_bytes[edge] += size
        length, last = self._clock.now - begin, len(meeting.names) - 1
        for number, (name, share) in enumerate(meeting.names):
            end = self._clock.now if number == last else begin + share * length
            for member in group:
                self._told(member, name, begin, end, meeting.is_sync)
            begin = end
        self._clock.happen(meeting.end)
