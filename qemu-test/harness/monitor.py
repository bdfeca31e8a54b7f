# SPDX-License-Identifier: GPL-2.0-only
"""The monitor of a QEMU process, in QMP, by the library of the QEMU project."""

import asyncio
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError
from qemu.qmp import QMPClient
from qemu.qmp import QMPError

TIMEOUT_S = 120


class MonitorError(OSError):
    """QEMU does not answer, or has not opened its monitor yet."""


class Monitor:
    """A connection to a monitor; it is made by the first command."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loop = asyncio.new_event_loop()
        self._client: QMPClient | None = None

    def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Executes a command and returns its result.

        Raises `MonitorError` if QEMU does not answer, and `ExecuteError` if it refuses the command.
        """
        if self._loop.is_closed():
            raise MonitorError(f"{command}: the connection is closed")
        try:
            return self._loop.run_until_complete(
                asyncio.wait_for(self._execute(command, arguments), TIMEOUT_S)
            )
        except ExecuteError:
            raise
        except (QMPError, OSError, EOFError, TimeoutError) as problem:
            self._drop()
            raise MonitorError(f"{command}: {problem}") from problem

    def close(self) -> None:
        """Closes the connection, which cannot be used afterwards."""
        self._drop()
        self._loop.close()

    async def _execute(self, command: str, arguments: dict[str, object] | None) -> object:
        if self._client is None:
            client = QMPClient()
            await client.connect(str(self._path))
            self._client = client
        self._client.events.clear()
        return await self._client.execute(command, arguments)

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                self._loop.run_until_complete(asyncio.wait_for(client.disconnect(), TIMEOUT_S))
            except (QMPError, OSError, EOFError, TimeoutError):
                pass  # QEMU is gone.
