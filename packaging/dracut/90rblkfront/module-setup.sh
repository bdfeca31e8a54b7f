#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Module of dracut: puts rblkfront into the initramfs, for a guest whose root
# disk it serves, and xen-blkfront, which such a guest needs with a kernel that
# rblkfront is not installed for.

check() {
	return 0
}

# A module that the kernel does not have is left out. A host-only initramfs takes
# only modules that are loaded now, which may be another one.
installkernel() {
	hostonly='' instmods rblkfront xen-blkfront
}

# The rule is where the Debian package puts it, or the administrator.
install() {
	inst_multiple -o /usr/lib/modprobe.d/rblkfront.conf /etc/modprobe.d/rblkfront.conf
}
