// SPDX-License-Identifier: GPL-2.0-only

//! Tables and other text for people.

use api::QueueStatus;

/// Aligns the columns of a table, two spaces apart. The first row is the head.
pub fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Returns a size with a binary unit and at most three digits after the point.
pub fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    for (unit, name) in UNITS {
        if bytes >= unit && bytes % (unit / 8).max(1) == 0 {
            let number = format!("{:.3}", bytes as f64 / unit as f64);
            return format!(
                "{} {name}",
                number.trim_end_matches('0').trim_end_matches('.')
            );
        }
    }
    format!("{bytes} B")
}

/// Describes the requests in flight, and the oldest one.
pub fn in_flight(queues: &[QueueStatus]) -> String {
    let count: u64 = queues.iter().map(|queue| queue.in_flight).sum();
    let oldest = queues.iter().filter_map(|queue| queue.oldest);
    match oldest.max_by_key(|request| request.age_ms) {
        None => count.to_string(),
        Some(oldest) => format!(
            "{count}, the oldest for {} ms: {} of sectors {}+{}, retries {}",
            oldest.age_ms, oldest.operation, oldest.sector, oldest.sectors, oldest.retries,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["A", "BB", ""], ["ccc", "d", "e"]].map(|row| row.map(str::to_owned));
        assert_eq!(align(&rows), "A    BB\nccc  d   e\n");
        assert_eq!(align::<2>(&[]), "");
    }

    #[test]
    fn sizes_are_exact() {
        for (bytes, text) in [
            (0, "0 B"),
            (1000, "1000 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            ((64 << 20) + 512, "65536.5 KiB"),
            (5 << 39, "2.5 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
