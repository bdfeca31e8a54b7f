#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Module of dracut: puts rblkfront into the initramfs, for a guest whose root
# disk it serves.

check() {
	return 0
}

installkernel() {
	instmods rblkfront
}

install() {
	inst_simple /etc/modprobe.d/rblkfront.conf
}
