# SPDX-License-Identifier: GPL-2.0-only
"""Whether the scenarios notice what is taken away from the drivers."""
