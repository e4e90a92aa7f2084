"""Whether somebody else used the processor while a system was measured. Linux only; elsewhere nobody is seen."""

import os
import time
from pathlib import Path

__all__ = ["Watch"]

STAT = Path("/proc/stat")
NICED = 1
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # user, niced, system, irq, softirq, steal: all but idle and iowait
SESSION, USER_TIME, SYSTEM_TIME = 3, 11, 12  # of /proc/PID/stat, counted behind the command's name


class Watch:
    """Compares the processor time of the whole machine with that of one session and this process.

    Before anything runs, what others do at a low priority does not count: it will give way.
    """

    def __init__(self, session: int | None) -> None:
        self._session = session
        self._fields = [field for field in BUSY_FIELDS if session is not None or field != NICED]
        self._began = time.monotonic()
        self._busy, self._own = self._busy_seconds(), self._own_seconds()

    def foreign_share(self) -> float:
        """The share of all cores that others used since this was made, 0 to 1."""
        if not STAT.exists():
            return 0.0
        others = (self._busy_seconds() - self._busy) - (self._own_seconds() - self._own)
        return max(0.0, others / ((time.monotonic() - self._began) * (os.cpu_count() or 1)))

    def _own_seconds(self) -> float:
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[SESSION]) == self._session or path.parent.name == str(os.getpid()):
                ticks += int(fields[USER_TIME]) + int(fields[SYSTEM_TIME])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _busy_seconds(self) -> float:
        if not STAT.exists():
            return 0.0
        ticks = [int(field) for field in STAT.read_text().splitlines()[0].split()[1:]]
        return sum(ticks[field] for field in self._fields) / os.sysconf("SC_CLK_TCK")
