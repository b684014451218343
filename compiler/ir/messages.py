"""How many messages a rank has under way to one other rank.

Neither transport tells at once when a message has left: gloo only when it is waited for, and over
NCCL the host runs far ahead of the device. Until then the sender keeps the tensor. So a rank waits
for its oldest message before it sends one more than this. The runtime keeps to it, the simulator
waits as it does, and the memory model counts the tensors. (Waiting cannot deadlock: programs are
proven to run even if every send blocked until its receive is posted.)
"""

from __future__ import annotations

__all__ = ["MAX_SENDS_UNDER_WAY"]

MAX_SENDS_UNDER_WAY = 8
