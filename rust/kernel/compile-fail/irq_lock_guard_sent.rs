// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! The interrupt state that a guard restores is that of its CPU.

use kernel_ext::base::spinlock_irqsave::SpinLockIrqSaveGuard;

fn needs_send<T: Send>(_: T) {}

fn give_away(guard: SpinLockIrqSaveGuard<'static, u32>) {
    needs_send(guard);
}
