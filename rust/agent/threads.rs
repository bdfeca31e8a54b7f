// SPDX-License-Identifier: GPL-2.0-only

//! Work in several threads.

use std::thread;

/// The greatest number of threads.
const THREADS: usize = 16;

/// Returns what a function returns for each of some items, in their order. It is called in several
/// threads, so that items for which it waits do not delay all others.
pub fn in_threads<T: Sync, R: Send>(items: &[T], call: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let share = items.len().div_ceil(THREADS).max(1);
    thread::scope(|scope| {
        let call = &call;
        let threads: Vec<_> = items
            .chunks(share)
            .map(|share| scope.spawn(move || share.iter().map(call).collect::<Vec<R>>()))
            .collect();
        // A panic ends the process.
        let results = threads.into_iter().filter_map(|thread| thread.join().ok());
        results.flatten().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for count in [0, 1, 16, 50] {
            let items: Vec<u32> = (0..count).collect();
            assert_eq!(in_threads(&items, |item| *item), items);
        }
    }
}
