"""How an engine process becomes one of a group: the leader, or one that follows it. What needs both the group's messages and jax.

    1. All meet at the leader (`engine/group/leader.py`), agree, and are told where their runtimes meet (`engine/group/distributed.py`).
    2. Each tells what devices it has; the leader resolves the configuration for the weakest, so that all build the same programs.
    3. Each builds. When all have, the leader tries the largest step, which the others make with it, and is ready.

Both ends of a group's life are `on_lost` and `on_unable`: they end this process, the first because another has ended, the second for a
reason that a restart does not cure.
"""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Never

from engine.config import EngineConfig, EngineOptions, GroupConfig
from engine.core import WarmRunner
from engine.errors import ConfigError
from engine.footprint import Device
from engine.group.follower import Follower
from engine.group.leader import Group, free_port
from engine.group.messages import Devices
from engine.heap import settle_heap
from engine.messages import Follow
from engine.types import Progress


def lead(
    options: EngineOptions, *, report: Callable[[Progress], None], on_lost: Callable[[str], Never], on_unable: Callable[[str], Never]
) -> tuple[Group, EngineConfig]:
    """A group whose processes build by now what this one has to build. Raises `EngineError` after telling them that there will be none."""
    group = Group(options, report=report, on_lost=on_lost, on_unable=on_unable)
    try:
        group.gather()
        config = _config(group, options)
    except Exception as error:
        group.dismiss(str(error))
        raise
    group.build(config)
    return group, config


def _config(group: Group, options: EngineOptions) -> EngineConfig:
    """For the devices that all have together, each process as many as the others."""
    from engine.group.distributed import join, own_cache_dir
    from engine.memory_check import config_for

    host = group.config.host
    coordinator = f"[{host}]:{free_port(host)}" if ":" in host else f"{host}:{free_port(host)}"
    group.join(coordinator)
    join(group.config, process_id=0, coordinator=coordinator)
    ours, device = _look_at_devices(options, group.config)
    others = group.devices()
    for process_id, theirs in enumerate(others, start=1):
        if (theirs.kind, theirs.num_devices) != (ours.kind, ours.num_devices):
            raise ConfigError(
                f"process {process_id} of the group has {theirs.num_devices} devices ({theirs.kind}), the leader {ours.num_devices} "
                f"({ours.kind}): give all the same"
            )
    weakest = replace(device, memory_bytes=min(ours.memory_bytes, *(theirs.memory_bytes for theirs in others)))
    config = config_for(options, weakest)
    return replace(config, compile_cache_dir=own_cache_dir(config.compile_cache_dir, group.config, process_id=0))


def _look_at_devices(options: EngineOptions, group: GroupConfig) -> tuple[Devices, Device]:
    """Those of this process; what is asked of each alone is how much memory it has."""
    import jax

    from engine.memory_check import device_here

    device = device_here(options)
    if device.is_host:
        device = replace(device, num_sharing=device.num_sharing * group.processes_per_node)
    return Devices(device.name, jax.local_device_count(), device.memory_bytes), device


def follow(
    message: Follow, *, report: Callable[[Progress], None], on_lost: Callable[[str], Never], on_dismissed: Callable[[str], Never]
) -> Never:
    """Raises `EngineError` where this process cannot follow."""
    parent = os.getppid()
    is_sibling = message.options.group is not None and message.process_id < message.options.group.processes_per_node

    def end(cause: str) -> Never:
        if is_sibling and os.getppid() == parent:  # the leader, which says nothing: it is stopped, and nobody else may notice as soon
            os.kill(parent, signal.SIGKILL)
        on_lost(cause)

    Follower(message, report=report, on_lost=end, on_dismissed=on_dismissed).run(_OnDevices(message, report))


class _OnDevices:
    """What `Follower` does with jax."""

    def __init__(self, message: Follow, report: Callable[[Progress], None]) -> None:
        assert message.options.group is not None, "checked by the follower"
        self._options = message.options
        self._group = message.options.group
        self._process_id = message.process_id
        self._report = report

    def join(self, coordinator: str) -> Devices:
        from engine.group.distributed import join

        join(self._group, process_id=self._process_id, coordinator=coordinator)
        devices, _ = _look_at_devices(self._options, self._group)
        return devices

    def build(self, config: EngineConfig) -> Sequence[WarmRunner]:
        """From this machine's files."""
        from engine.build import build_runners
        from engine.group.distributed import own_cache_dir

        cache_dir = own_cache_dir(self._options.compile_cache_dir, self._group, process_id=self._process_id)
        config = replace(config, model_dir=self._options.model_dir, compile_cache_dir=cache_dir)
        runners = build_runners(config, report=self._report).runners
        settle_heap()
        return runners
