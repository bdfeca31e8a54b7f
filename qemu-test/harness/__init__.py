# SPDX-License-Identifier: GPL-2.0-only
"""The test host: kernels, images and QEMU machines that scenarios drive."""
