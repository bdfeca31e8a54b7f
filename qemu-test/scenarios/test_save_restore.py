# SPDX-License-Identifier: GPL-2.0
"""A guest is saved and restored while it reads, writes, flushes and discards.

The disk answers each request after a while, so that many are in flight when
the guest is told to stop. Each program checks what it reads; none may see an error.
"""

from harness.evidence import assert_served_by_pair
from harness.guest import TWO_VCPUS
from harness.xenhost import Disk

SLOW_DISK = "memory_backed=1 discard=1 cache_size=64 irqmode=2 completion_nsec=20000000 gb=1"
IMAGE = "/dev/vdb"
LESS = (
    'xenstore-write "$XENBUS_PATH/feature-max-indirect-segments" 0 '
    '"$XENBUS_PATH/multi-queue-max-queues" 1 "$XENBUS_PATH/max-ring-page-order" 0'
)
FIO = (
    "fio --name={name} --filename=/dev/xvda --ioengine=libaio --direct=1 --offset={offset}M --size=1M "
    "--iodepth=16 --bsrange=512-128k --blockalign=512 --verify_fatal=1 --randseed=$pass --output-format=terse "
)
JOBS = {
    "data": "--rw=randwrite --verify=crc32c --do_verify=1 --norandommap=0",
    "synced": "--rw=randwrite --verify=crc32c --do_verify=1 --sync=dsync",
    "mixed": "--rw=randrw --verify=crc32c --verify_backlog=16",
    "trimmed": "--rw=trimwrite --bsrange=4k-128k --blockalign=4k",
}


def start_jobs(guest):
    """Each job begins again when it is done, with other blocks, and counts how often."""
    for number, (name, options) in enumerate(JOBS.items()):
        command = FIO.format(name=name, offset=16 * number) + options
        guest.sh(
            f"(pass=0; while [ ! -e /tmp/stop ]; do pass=$((pass + 1)); "
            f"{command} || {{ touch /tmp/failed; break; }}; echo $pass > /tmp/{name}; done) "
            f"> /tmp/{name}.log 2>&1 &"
        )


def wait_for_passes(guest, count):
    """Each job ends `count` more passes than it has, or fails."""
    counts = "; ".join(f"cat /tmp/{name} 2>/dev/null || echo 0" for name in JOBS)
    done = map(int, guest.sh(counts).splitlines())
    more = " && ".join(
        f"[ $(cat /tmp/{name} 2>/dev/null || echo 0) -ge {number + count} ]"
        for name, number in zip(JOBS, done, strict=True)
    )
    guest.wait_for(f"[ -e /tmp/failed ] || {{ {more}; }}", timeout=600)
    assert guest.run("[ -e /tmp/failed ]")[0] == 1, guest.sh("tail -n 20 /tmp/*.log")


def start(xen):
    """A guest with two large rings whose jobs have passed once."""
    host = xen(
        waiting=TWO_VCPUS, front_parameters="max_ring_page_order=1 max_indirect_segments=64"
    )
    host.load_backend("max_queues=2")
    host.insmod("configfs")
    host.insmod("null_blk", SLOW_DISK)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/nullb0")])
    assert_served_by_pair(host, guest)
    start_jobs(guest)
    wait_for_passes(guest, 1)
    return host, guest


def stop(host, guest):
    """The jobs end, with what they have read being right, and nothing is in flight."""
    guest.sh("touch /tmp/stop")
    guest.wait_for("! pidof fio", timeout=600)
    assert guest.run("[ -e /tmp/failed ]")[0] == 1
    assert sum(map(int, host.sh("cat /sys/block/nullb0/inflight").split())) == 0
    assert_served_by_pair(host, guest)


def test_save_restore(xen, record_property):
    """To a backend that is as good as the old one; then to one with one ring of one page, no
    indirect requests, no persistent grants.

    xen-blkfront is asked for the first alone. To change the number of its queues it waits for
    flushes and discards in flight, which wait for the new connection. With one queue before
    and after, a request that waits in the queue, with more segments than the backend takes
    now, is a BUG.

    Rows: FE-42, FE-44, FE-66, F-06, F-10
    """
    host, guest = start(xen)
    guest.save(IMAGE)
    guest.restore(IMAGE)
    wait_for_passes(guest, 1)
    if guest.front == "xen-blkfront":
        record_property("c_not_asked", "F-06, F-10")
        stop(host, guest)
        return

    guest.save(IMAGE)
    parameters = f"/sys/module/{host.pair.back.name.replace('-', '_')}/parameters"
    host.sh(f"echo '{LESS}' >> /etc/xen/scripts/blk-min; echo N > {parameters}/feature_persistent")
    guest.restore(IMAGE)
    wait_for_passes(guest, 1)
    front = f"/local/domain/{guest.domid}/device/vbd/51712"
    assert host.xenstore_read(f"{front}/multi-queue-num-queues") is None
    assert host.xenstore_read(f"{front}/ring-page-order") is None
    stop(host, guest)
