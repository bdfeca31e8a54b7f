#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Module of dracut: puts rblkback into the initramfs of a backend domain. Where
# modules-load.d names xen-blkback, dracut puts that into the initramfs, which
# loads it.

check() {
	return 0
}

# A module that the kernel does not have is left out. A host-only initramfs takes
# only modules that are loaded now, which may be another one.
installkernel() {
	hostonly='' instmods rblkback xen-blkback
}

# The rule is where the Debian package puts it, or the administrator.
install() {
	inst_multiple -o /usr/lib/modprobe.d/rblkback.conf /etc/modprobe.d/rblkback.conf
}
